//! Makes the stages of one rank: which parameters there are, under which published names, and over whom each is replicated.
//!
//! Knows the topology and the placement of stages; no actor and no fabric.

use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::schedule::{Bucket, Contents, LayerKind, StageLayout, buckets};
use contraflow_runtime::topology::Topology;

use super::params::{ParamId, Params, PublishedTensor, RankParams, Replicas};
use super::{Architecture, AttentionWeights, FfnWeights, HeadWeights, Layer, MtpWeights, Query, Stage};

/// Where the stages are.
pub struct Placement<'a> {
    /// Sizes of the axes.
    pub topology: Topology,
    /// Stages per pipeline rank.
    pub stages_of: &'a [Vec<usize>],
    /// What each stage consists of.
    pub layouts: &'a [StageLayout],
}

/// The stages of a rank with their parameters, all zero: dense ones and those of its routed experts.
pub struct RankModel {
    /// In the order of the placement.
    pub stages: Vec<Stage>,
    /// Everything but the routed experts.
    pub dense: Params,
    /// The routed experts this rank owns.
    pub experts: Params,
}

/// Makes the model of one rank.
pub fn build(arch: &Architecture, placement: &Placement, rank: usize) -> RankModel {
    build_in(arch, placement, rank, (Params::default(), Params::default()))
}

/// The parameters that a rank holds, without their values.
pub fn outline(arch: &Architecture, placement: &Placement, rank: usize) -> RankParams {
    let RankModel { dense, experts, .. } =
        build_in(arch, placement, rank, (Params::outline(), Params::outline()));
    RankParams { dense, experts }
}

fn build_in(
    arch: &Architecture,
    placement: &Placement,
    rank: usize,
    (dense, experts): (Params, Params),
) -> RankModel {
    let at = placement.topology.coordinates(rank);
    let buckets = buckets(placement.stages_of, placement.layouts, &placement.topology);
    let mut builder = Builder { arch, placement, buckets, expert: at.expert, dense, experts };
    let stages = placement.stages_of[at.pipeline].iter().map(|&stage| builder.stage(stage)).collect();
    RankModel { stages, dense: builder.dense, experts: builder.experts }
}

struct Builder<'a> {
    arch: &'a Architecture,
    placement: &'a Placement<'a>,
    buckets: Vec<Bucket>,
    expert: usize,
    dense: Params,
    experts: Params,
}

impl Builder<'_> {
    /// The bucket of some parameters of a stage, and the ranks that hold this rank's copy of it.
    ///
    /// # Panics
    /// If the stage has none: layouts and model do not belong together.
    fn replicas(&self, contents: Contents, stage: usize) -> Replicas {
        let of_stage = |bucket: &&Bucket| bucket.contents == contents && bucket.stages.contains(&stage);
        let bucket = self.buckets.iter().find(of_stage);
        let bucket = bucket.unwrap_or_else(|| panic!("stage {stage} has no bucket of {contents:?}"));
        Replicas { group: bucket.ranks(&self.placement.topology, self.expert), bucket: bucket.number }
    }

    fn stage(&mut self, index: usize) -> Stage {
        let layout = &self.placement.layouts[index];
        let config = &self.arch.config;
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let group = self.replicas(Contents::Dense, index);
        let embedding = layout.embedding.then(|| self.embedding(index));
        let layers = layout.layers.iter().enumerate();
        let layers =
            layers.map(|(at, &kind)| self.layer(index, layout.first_layer + at, kind, &group)).collect();
        let head = layout.head.then(|| HeadWeights {
            norm: self.dense.add_single("model.norm.weight".into(), &[hidden], Format::F32, &group),
            head: match layout.tied {
                true => self.embedding(index),
                false => self.dense.add_single(
                    "lm_head.weight".into(),
                    &[vocabulary, hidden],
                    self.arch.precision.activations,
                    &group,
                ),
            },
        });
        let mtp = layout.mtp_layer.map(|layer| self.mtp(index, layer, &group));
        Stage { index, layout: layout.clone(), embedding, layers, head, mtp }
    }

    /// Held by the first stage, and by the last one if MTP or a head that is tied to it needs it there.
    fn embedding(&mut self, stage: usize) -> ParamId {
        let group = self.replicas(Contents::Embedding, stage);
        let shape = [self.arch.config.vocab_size, self.arch.config.hidden_size];
        let format = self.arch.precision.activations;
        self.dense.add_single("model.embed_tokens.weight".into(), &shape, format, &group)
    }

    fn layer(&mut self, stage: usize, index: usize, kind: LayerKind, group: &Replicas) -> Layer {
        let arch = self.arch;
        let config = &arch.config;
        let attention = self.attention(index, kind, group);
        match kind {
            LayerKind::Dense => {
                let prefix = format!("model.layers.{index}.mlp");
                let ffn = ffn(&mut self.dense, arch, &prefix, config.intermediate_size, group);
                Layer { index, attention, ffn, experts: None }
            }
            LayerKind::Moe => {
                let prefix = format!("model.layers.{index}.mlp.shared_experts");
                let width = config.moe_intermediate_size * config.n_shared_experts;
                let ffn = ffn(&mut self.dense, arch, &prefix, width, group);
                if config.has_gate_bias() {
                    self.dense.gate_biases.insert(index, Tensor::zeros(&[config.n_routed_experts]));
                }
                self.dense.expert_counts.insert(index, vec![0; config.n_routed_experts]);
                Layer { index, attention, ffn, experts: Some(self.routed_experts(stage, index)) }
            }
        }
    }

    fn attention(&mut self, layer: usize, kind: LayerKind, group: &Replicas) -> AttentionWeights {
        let config = &self.arch.config;
        let (hidden, heads, rank) = (config.hidden_size, config.num_attention_heads, config.kv_lora_rank);
        let prefix = format!("model.layers.{layer}");
        let dense = &mut self.dense;
        // Matrices are factors of products; vectors are those of norms.
        let linear = self.arch.precision.linear;
        let mut add = |name: &str, shape: &[usize]| {
            let is_factor = shape.len() == 2 && name != "mlp.gate";
            let format = if is_factor { linear } else { Format::F32 };
            dense.add_single(format!("{prefix}.{name}.weight"), shape, format, group)
        };
        let q_width = heads * config.qk_head_dim();
        let query = match config.q_lora_rank {
            Some(latent) => Query::Latent {
                down: add("self_attn.q_a_proj", &[latent, hidden]),
                norm: add("self_attn.q_a_layernorm", &[latent]),
                up: add("self_attn.q_b_proj", &[q_width, latent]),
            },
            None => Query::Direct(add("self_attn.q_proj", &[q_width, hidden])),
        };
        let kv_width = heads * (config.qk_nope_head_dim + config.v_head_dim);
        AttentionWeights {
            layer,
            input_norm: add("input_layernorm", &[hidden]),
            query,
            kv_down: add("self_attn.kv_a_proj_with_mqa", &[rank + config.qk_rope_head_dim, hidden]),
            kv_norm: add("self_attn.kv_a_layernorm", &[rank]),
            kv_up: add("self_attn.kv_b_proj", &[kv_width, rank]),
            output: add("self_attn.o_proj", &[hidden, heads * config.v_head_dim]),
            post_norm: add("post_attention_layernorm", &[hidden]),
            gate: (kind == LayerKind::Moe).then(|| add("mlp.gate", &[config.n_routed_experts, hidden])),
        }
    }

    fn routed_experts(&mut self, stage: usize, layer: usize) -> FfnWeights {
        let config = &self.arch.config;
        let (hidden, width) = (config.hidden_size, config.moe_intermediate_size);
        let owned = config.n_routed_experts / self.placement.topology.expert;
        let group = self.replicas(Contents::Experts, stage);
        let format = self.arch.precision.linear;
        let mut gate_up = Vec::new();
        let mut down = Vec::new();
        for local in 0..owned {
            let name = |kind: &str| {
                format!("model.layers.{layer}.mlp.experts.{}.{kind}_proj.weight", self.expert * owned + local)
            };
            let matrix = width * hidden;
            gate_up.push(PublishedTensor {
                name: name("gate"),
                shape: vec![width, hidden],
                offset: 2 * local * matrix,
            });
            gate_up.push(PublishedTensor {
                name: name("up"),
                shape: vec![width, hidden],
                offset: (2 * local + 1) * matrix,
            });
            down.push(PublishedTensor {
                name: name("down"),
                shape: vec![hidden, width],
                offset: local * matrix,
            });
        }
        FfnWeights {
            gate_up: self.experts.add(&[owned, 2 * width, hidden], gate_up, format, &group),
            down: self.experts.add(&[owned, hidden, width], down, format, &group),
        }
    }

    fn mtp(&mut self, stage: usize, layer: usize, group: &Replicas) -> MtpWeights {
        let (hidden, linear) = (self.arch.config.hidden_size, self.arch.precision.linear);
        let name = |kind: &str| format!("model.layers.{layer}.{kind}.weight");
        MtpWeights {
            embedding: self.embedding(stage),
            embedding_norm: self.dense.add_single(name("enorm"), &[hidden], Format::F32, group),
            hidden_norm: self.dense.add_single(name("hnorm"), &[hidden], Format::F32, group),
            projection: self.dense.add_single(name("eh_proj"), &[hidden, 2 * hidden], linear, group),
            layer: self.layer(stage, layer, LayerKind::Moe, group),
            norm: self.dense.add_single(name("shared_head.norm"), &[hidden], Format::F32, group),
        }
    }
}

fn ffn(params: &mut Params, arch: &Architecture, prefix: &str, width: usize, group: &Replicas) -> FfnWeights {
    let (hidden, format) = (arch.config.hidden_size, arch.precision.linear);
    let part = |kind: &str, row: usize| PublishedTensor {
        name: format!("{prefix}.{kind}_proj.weight"),
        shape: vec![width, hidden],
        offset: row * hidden,
    };
    FfnWeights {
        gate_up: params.add(&[2 * width, hidden], vec![part("gate", 0), part("up", width)], format, group),
        down: params.add_single(format!("{prefix}.down_proj.weight"), &[hidden, width], format, group),
    }
}
