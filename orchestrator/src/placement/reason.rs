//! Why a job has the layout that it has, in a sentence. Pure; knows no job.

use contraflow_runtime::faults::count;
use contraflow_runtime::topology::Topology;

/// What keeps a job from more ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    /// It has so many or none.
    Fixed,
    /// It may not have more.
    Most,
    /// Somebody has said how many it is to have.
    Scaled,
    /// Others wait, and it has what it asks for.
    Asked,
    /// So many slots are free.
    Free(usize),
    /// So many slots are free or its own.
    Own(usize),
    /// So many of the free slots are for it; others wait.
    Share(usize),
    /// A larger layout has no place, in words.
    Place(Topology, String),
}

/// What a layout follows from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The layout.
    pub axes: Topology,
    /// That of the recipe.
    pub base: Topology,
    /// How many layouts the recipe names; 0: every one that it can be run on will do.
    pub named: usize,
    /// What is in the way of more.
    pub limit: Limit,
    /// A larger one that it may have.
    pub larger: Option<Topology>,
}

impl Reason {
    /// As a sentence, with the layout.
    pub fn words(&self) -> String {
        let Topology { pipeline, expert, data } = self.axes;
        let limit = match &self.limit {
            Limit::Fixed => "as its recipe says".to_owned(),
            Limit::Most => "the most that it may have".to_owned(),
            Limit::Scaled => "as it was scaled".to_owned(),
            Limit::Asked => "as many as its recipe names, while others wait".to_owned(),
            Limit::Free(slots) => format!("the most that {} {}", count(slots, "free slot"), allow(*slots)),
            Limit::Own(slots) => {
                format!("the most that {}, free or its own, {}", count(slots, "slot"), allow(*slots))
            }
            Limit::Share(slots) => {
                format!("the most that {} {}, while others wait", count(slots, "slot"), allow(*slots))
            }
            Limit::Place(of, why) => format!("the most that has a place; {}: {why}", short(of)),
        };
        let [order, larger] = match self.limit {
            Limit::Fixed | Limit::Scaled => Default::default(),
            Limit::Place(..) => [self.order(), String::new()],
            _ => [self.order(), self.larger()],
        };
        let ranks = count(self.axes.world(), "rank");
        format!("{ranks} as pipeline {pipeline}, expert {expert}, data {data}: {limit}{order}{larger}")
    }

    /// Along which axes it differs from the recipe, in the order in which that is tried.
    fn order(&self) -> String {
        let Reason { axes, base, .. } = self;
        match () {
            () if self.named > 0 => format!("; of {} that the recipe names", count(self.named, "layout")),
            () if axes.pipeline != base.pipeline => "; data first, then expert, then pipeline".to_owned(),
            () if axes.expert != base.expert => "; data first, then expert".to_owned(),
            () if axes.data != base.data => "; data first".to_owned(),
            () => String::new(),
        }
    }

    fn larger(&self) -> String {
        let words = |larger: &Topology| format!("; {} needs {}", short(larger), larger.world());
        self.larger.as_ref().map(words).unwrap_or_default()
    }
}

fn allow(slots: usize) -> &'static str {
    if slots == 1 { "allows" } else { "allow" }
}

/// Pipeline, expert and data ranks.
fn short(Topology { pipeline, expert, data }: &Topology) -> String {
    format!("{pipeline},{expert},{data}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn axes(pipeline: usize, expert: usize, data: usize) -> Topology {
        Topology { pipeline, expert, data }
    }

    #[test]
    fn a_layout_says_what_limits_it_in_which_order_and_what_more_would_take() {
        let of =
            |chosen, limit, larger| Reason { axes: chosen, base: axes(2, 2, 2), named: 0, limit, larger };
        let whole = Some(axes(2, 2, 2));
        assert_eq!(
            of(axes(2, 2, 1), Limit::Free(5), whole).words(),
            "4 ranks as pipeline 2, expert 2, data 1: the most that 5 free slots allow; data first; 2,2,2 needs 8"
        );
        assert_eq!(
            of(axes(2, 1, 1), Limit::Own(2), whole).words(),
            "2 ranks as pipeline 2, expert 1, data 1: the most that 2 slots, free or its own, allow; data first, then \
             expert; 2,2,2 needs 8"
        );
        assert_eq!(
            of(axes(1, 1, 1), Limit::Share(1), whole).words(),
            "1 rank as pipeline 1, expert 1, data 1: the most that 1 slot allows, while others wait; data first, then \
             expert, then pipeline; 2,2,2 needs 8"
        );
        assert_eq!(
            of(axes(2, 2, 2), Limit::Asked, Some(axes(2, 2, 4))).words(),
            "8 ranks as pipeline 2, expert 2, data 2: as many as its recipe names, while others wait; 2,2,4 needs 16"
        );
        assert_eq!(
            of(axes(2, 2, 2), Limit::Fixed, None).words(),
            "8 ranks as pipeline 2, expert 2, data 2: as its recipe says"
        );
        assert_eq!(
            of(axes(2, 2, 4), Limit::Most, None).words(),
            "16 ranks as pipeline 2, expert 2, data 4: the most that it may have; data first"
        );
        let no_place = Limit::Place(axes(2, 2, 2), "needs 8 ranks, 4 healthy".into());
        let named = Reason { named: 2, ..of(axes(2, 2, 1), no_place, whole) };
        assert_eq!(
            named.words(),
            "4 ranks as pipeline 2, expert 2, data 1: the most that has a place; 2,2,2: needs 8 ranks, 4 healthy; of 2 \
             layouts that the recipe names"
        );
        assert_eq!(
            Reason { limit: Limit::Scaled, ..named }.words(),
            "4 ranks as pipeline 2, expert 2, data 1: as it was scaled"
        );
    }
}
