//! What slots have been used for, as it is shown: parts, the share of steps, words. Pure.

use contraflow_proto::v1;
use serde_json::{Value, json};

use crate::progress::hms;

/// The parts by name, which together are all the time. **Units**: seconds of one slot.
pub fn parts(goodput: &v1::Goodput) -> [(&'static str, f64); 6] {
    let v1::Goodput { committed, recomputed, forming, recovery, undecided, idle } = *goodput;
    [
        ("committed", committed),
        ("recomputed", recomputed),
        ("forming", forming),
        ("recovery", recovery),
        ("undecided", undecided),
        ("idle", idle),
    ]
}

/// All the time. **Units**: seconds of one slot.
fn whole(goodput: &v1::Goodput) -> f64 {
    parts(goodput).iter().map(|(_, seconds)| seconds).sum()
}

/// The share of all the time that became committed steps; none before there was any.
pub fn share(goodput: &v1::Goodput) -> Option<f64> {
    let whole = whole(goodput);
    (whole > 0.0).then(|| goodput.committed / whole)
}

/// As `--format json` prints it: the share, all the time, and its parts.
pub fn json(goodput: Option<&v1::Goodput>) -> Value {
    let Some(goodput) = goodput else { return Value::Null };
    let mut value = json!({"share": share(goodput), "slot_seconds": whole(goodput)});
    parts(goodput).into_iter().for_each(|(name, seconds)| value[name] = json!(seconds));
    value
}

/// One line: the share, and where the rest went, what took most of it first.
pub fn words(goodput: &v1::Goodput) -> Option<String> {
    let (share, whole) = (share(goodput)?, whole(goodput));
    let mut rest = parts(goodput)[1..].to_vec();
    rest.retain(|(_, seconds)| *seconds >= 0.0005 * whole);
    rest.sort_by(|a, b| b.1.total_cmp(&a.1));
    let rest = rest.iter().map(|(name, seconds)| format!("{name} {:.1}%", 100.0 * seconds / whole));
    let rest = rest.collect::<Vec<_>>().join(", ");
    let separator = if rest.is_empty() { "" } else { "; " };
    Some(format!("{:.1}% of {} slot time became steps{separator}{rest}", 100.0 * share, hms(whole)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_and_the_parts_are_of_the_whole() {
        let goodput = v1::Goodput {
            committed: 300.0,
            recomputed: 20.0,
            forming: 60.0,
            recovery: 15.0,
            undecided: 5.0,
            idle: 0.0,
        };
        let json = json(Some(&goodput));
        assert_eq!((&json["share"], &json["slot_seconds"]), (&0.75.into(), &400.0.into()));
        let sum = parts(&goodput).iter().map(|(name, _)| json[name].as_f64().unwrap()).sum::<f64>();
        assert_eq!(sum, 400.0);
        let expected = "75.0% of 6:40 slot time became steps; forming 15.0%, recomputed 5.0%, recovery 3.8%, undecided 1.2%";
        assert_eq!(words(&goodput).unwrap(), expected);
        let all = v1::Goodput { committed: 3_600.0, ..v1::Goodput::default() };
        assert_eq!(words(&all).unwrap(), "100.0% of 1:00:00 slot time became steps");
        assert_eq!((share(&v1::Goodput::default()), words(&v1::Goodput::default())), (None, None));
    }
}
