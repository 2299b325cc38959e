//! What the definitions of all our kinds of objects have in common; knows no kind.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, ValidationRule,
};

/// A definition with the rules that a type cannot say: of the whole object, and of its spec, to whose schema `also` is done.
pub(crate) fn ruled(
    mut definition: CustomResourceDefinition,
    whole: &[ValidationRule],
    of_spec: &[ValidationRule],
    also: impl Fn(&mut JSONSchemaProps),
) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        let Some(schema) = schema else { continue };
        drop_nulls(schema);
        schema.x_kubernetes_validations = Some(whole.to_vec());
        let Some(spec) = schema.properties.as_mut().and_then(|properties| properties.get_mut("spec")) else {
            continue;
        };
        spec.x_kubernetes_validations = Some(of_spec.to_vec());
        also(spec);
    }
    definition
}

/// A rule of CEL, what is said where it does not hold, and of which field.
pub(crate) fn rule(rule: &str, words: &str, field: Option<&str>) -> ValidationRule {
    ValidationRule {
        rule: rule.to_owned(),
        message: Some(words.to_owned()),
        field_path: field.map(str::to_owned),
        ..ValidationRule::default()
    }
}

/// What is null counts as not there, to rules too.
fn drop_nulls(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.properties.iter_mut().flat_map(|properties| properties.values_mut()).for_each(drop_nulls);
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        drop_nulls(item);
    }
}
