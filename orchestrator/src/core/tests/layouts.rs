//! Which layout a job gets, of all legal ones or of those that its recipe names, and why.

use super::*;
use crate::queue::Size;

/// A job on two, four or eight ranks, of which its recipe has four.
fn named() -> Box<JobSpec> {
    let layouts = "elastic.layouts=[[1, 1, 2], [2, 1, 2], [2, 2, 2]]";
    Box::new(JobSpec { min_ranks: 2, max_ranks: 8, ..*spec_with(2, 0, &["parallel.pipeline=2", layouts]) })
}

fn with_workers(workers: u64) -> World {
    let mut world = World::new();
    (1..=workers).for_each(|worker| drop(world.attach(worker, Vec::new())));
    world
}

/// The layout of the first job as it is kept, and whether its log has it.
fn layout(world: &World, effects: &[Effect]) -> (String, bool) {
    let layout = world.core.jobs().all[&JOB].formed.clone().unwrap().layout;
    let line = format!("layout: {layout}");
    let is_told = logged(effects).contains(&line.as_str());
    (layout, is_told)
}

#[test]
fn a_job_has_the_largest_of_the_layouts_that_its_recipe_names_and_says_why() {
    for (workers, words) in [
        (
            3,
            "2 ranks as pipeline 1, expert 1, data 2: the most that 3 free slots allow; of 3 layouts that the recipe \
             names; 2,1,2 needs 4",
        ),
        (
            7,
            "4 ranks as pipeline 2, expert 1, data 2: the most that 7 free slots allow; of 3 layouts that the recipe \
             names; 2,2,2 needs 8",
        ),
        (
            9,
            "8 ranks as pipeline 2, expert 2, data 2: the most that it may have; of 3 layouts that the recipe names",
        ),
    ] {
        let mut world = with_workers(workers);
        let effects = world.step(Event::Submit(named()));
        assert_eq!(layout(&world, &effects), (words.to_owned(), true), "{workers} workers");
        assert_eq!(world.core.size(JOB), Size { least: 2, asked: 4, most: 8 });
    }
    let mut world = with_workers(1);
    drop(world.step(Event::Submit(named())));
    assert_eq!(world.core.waiting_for(JOB), "needs 4 ranks or at least 2, 1 healthy");
}

#[test]
fn the_least_and_the_most_ranks_of_a_job_leave_some_named_layouts_out() {
    let size = |min_ranks, max_ranks| {
        let mut world = with_workers(1);
        drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks, max_ranks, ..*named() }))));
        let Size { least, asked, most } = world.core.size(JOB);
        [least, asked, most]
    };
    assert_eq!(size(3, 7), [4, 4, 4]);
    assert_eq!(size(1, 0), [2, 4, 4]);
    assert_eq!(size(4, 64), [4, 4, 8]);
}

#[test]
fn a_job_is_scaled_to_a_named_number_of_ranks_alone() {
    let mut world = with_workers(9);
    drop(world.step(Event::Submit(named())));
    let refused = |ranks| world.core.check_scale(JOB, ranks).unwrap_err();
    let words = "ranks: expected 2 or 4 or 8, those of the layouts that the recipe names, got";
    assert_eq!([1, 3, 9].map(refused), [1, 3, 9].map(|ranks| format!("{words} {ranks}")));
    assert_eq!([0, 2, 4, 8].map(|ranks| world.core.check_scale(JOB, ranks)), [const { Ok(()) }; 4]);
    // Beyond the most that it was submitted with, too.
    let mut world = with_workers(1);
    drop(world.step(Event::Submit(Box::new(JobSpec { max_ranks: 4, ..*named() }))));
    let scaled = |world: &mut World, ranks| {
        drop(world.step(Event::Scale { job: JOB, ranks }));
        world.core.size(JOB)
    };
    assert_eq!(scaled(&mut world, 2), Size { least: 2, asked: 2, most: 2 });
    assert_eq!(scaled(&mut world, 8), Size { least: 2, asked: 8, most: 8 });
    assert_eq!(scaled(&mut world, 0), Size { least: 2, asked: 4, most: 4 });
}

#[test]
fn a_job_without_named_layouts_says_in_which_order_its_axes_change() {
    let elastic = || Box::new(JobSpec { min_ranks: 1, max_ranks: 6, ..*spec(4, 0) });
    let of = |workers| {
        let mut world = with_workers(workers);
        let effects = world.step(Event::Submit(elastic()));
        layout(&world, &effects).0
    };
    assert_eq!(
        of(3),
        "3 ranks as pipeline 1, expert 1, data 3: the most that 3 free slots allow; data first; 1,1,4 needs 4"
    );
    assert_eq!(
        of(5),
        "4 ranks as pipeline 1, expert 1, data 4: the most that 5 free slots allow; 1,1,6 needs 6"
    );
    assert_eq!(of(6), "6 ranks as pipeline 1, expert 1, data 6: the most that it may have; data first");
    let mut world = with_workers(4);
    let effects = world.step(Event::Submit(spec(4, 0)));
    let words = "4 ranks as pipeline 1, expert 1, data 4: as its recipe says";
    assert_eq!(layout(&world, &effects), (words.to_owned(), true));
}

#[test]
fn a_job_that_has_lost_a_rank_goes_on_in_a_named_layout_and_says_so_once() {
    let mut world = with_workers(4);
    let recipe = ["checkpoint.in_memory=false", "elastic.layouts=[[1, 1, 2], [1, 1, 4]]"];
    let spec = Box::new(JobSpec { min_ranks: 1, ..*spec_with(4, 0, &recipe) });
    drop(world.step(Event::Submit(spec)));
    let effects = world.pass(LEASE_MS + SHRINK_MS + 3 * TICK_MS, &[1, 2, 3]);
    let words = "2 ranks as pipeline 1, expert 1, data 2: the most that 3 slots, free or its own, allow; of 2 layouts \
                 that the recipe names; 1,1,4 needs 4";
    assert_eq!(layout(&world, &effects), (words.to_owned(), true));
    // Where a lost rank has another place, the layout is the one before, for the same reason.
    let effects = world
        .pass(LEASE_MS + 2 * TICK_MS, &world.places()[..1].iter().copied().chain([3]).collect::<Vec<_>>());
    assert_eq!(layout(&world, &effects), (words.to_owned(), false));
    assert_eq!(world.core.jobs().all[&JOB].generation().number(), 3);
}

#[test]
fn memory_that_is_too_small_for_a_larger_layout_is_why_a_job_has_a_smaller_one() {
    let mut world = World::new();
    for worker in 1..=4 {
        let registration =
            Registration { memory_bytes: if worker > 2 { 1 << 10 } else { 1 << 40 }, ..registration(worker) };
        drop(world.join(Attachment { registration, ..Attachment::default() }));
    }
    let spec = spec_with(4, 0, &["elastic.layouts=[[1, 1, 2], [1, 1, 4]]"]);
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 2, rank_bytes: 1 << 20, ..*spec }))));
    let (words, _) = layout(&world, &[]);
    let begins = "2 ranks as pipeline 1, expert 1, data 2: the most that has a place; 1,1,4: needs 4 ranks, 4 healthy, 2 with too little memory: ";
    assert!(words.starts_with(begins) && words.ends_with("; of 2 layouts that the recipe names"), "{words}");
}
