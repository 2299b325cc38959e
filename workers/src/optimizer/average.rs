//! The moving average of the weights, beside the training (report section 3.2.3).
//!
//! A thread holds the average of what this rank answers for, and moves it towards the masters after every update. The training
//! hands it the masters, shared until they are written, and goes on: the average of a step is that of the step's masters, whatever
//! the timing. Whoever is to keep the average gets tensors that it will have. Knows tensors in an order, no shards and no names.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use contraflow_kernels::elementwise::approach;
use contraflow_kernels::tensor::Tensor;

use crate::background::yield_to_training;
use crate::checkpoint::Awaited;
use crate::error::RankError;

/// A rank's part of the average.
pub(super) struct Average {
    orders: SyncSender<Order>,
    len: usize,
}

/// What is done after a step.
struct Order {
    /// The weights to move towards; none if the step has updated none.
    masters: Vec<Tensor>,
    /// Where the average is wanted afterwards; nowhere, or everywhere.
    wanted: Vec<Awaited>,
}

impl Drop for Order {
    fn drop(&mut self) {
        self.wanted.iter().for_each(Awaited::give_up);
    }
}

impl Average {
    /// Begins with `values`.
    ///
    /// **Errors**: the thread cannot be started.
    pub(super) fn start(decay: f64, values: Vec<Tensor>) -> std::io::Result<Average> {
        // Who brings an order waits until the one before is done: there are never more copies than two.
        let (orders, received) = sync_channel(0);
        let len = values.len();
        std::thread::Builder::new().name("average".into()).spawn(move || {
            yield_to_training();
            follow(&received, (1.0 - decay) as f32, values);
        })?;
        Ok(Average { orders, len })
    }

    /// Has the average moved towards `masters`, if there are any. Where it is wanted each of its tensors comes as it is done.
    ///
    /// **Errors**: the thread has ended, by a panic.
    pub(super) fn order(&self, masters: Vec<Tensor>, is_wanted: bool) -> Result<Vec<Awaited>, RankError> {
        let mut wanted = Vec::new();
        wanted.resize_with(if is_wanted { self.len } else { 0 }, Awaited::default);
        if !masters.is_empty() || is_wanted {
            let order = Order { masters, wanted: wanted.clone() };
            let sent = self.orders.send(order);
            sent.map_err(|_| RankError::ActorGone { actor: "the average of the weights" })?;
        }
        Ok(wanted)
    }
}

/// The average's thread, until nobody sends orders.
fn follow(orders: &Receiver<Order>, share: f32, mut values: Vec<Tensor>) {
    for mut order in orders {
        // Each tensor is let go as soon as it is read: the update after would copy those that are held.
        let mut masters = std::mem::take(&mut order.masters).into_iter();
        for (index, value) in values.iter_mut().enumerate() {
            if let Some(master) = masters.next() {
                let len = value.len();
                approach(value.view_mut(0..len), master.view(0..len), share);
            }
            if let Some(awaited) = order.wanted.get(index) {
                awaited.give(value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use contraflow_kernels::host::HostValues;

    use super::*;

    #[test]
    fn the_average_follows_what_it_is_given_however_late_and_whoever_keeps_it() {
        let average = Average::start(0.75, vec![Tensor::from_vec(&[2], vec![0.0_f32, 8.0])]).unwrap();
        let mut weight = Tensor::from_vec(&[2], vec![4.0_f32, 8.0]);
        let first = average.order(vec![weight.clone()], true).unwrap();
        // The next update does not wait for it.
        weight.view_mut(0..2).copy_from(Tensor::from_vec(&[2], vec![-7.0_f32, 0.0]).view(0..2));
        let skipped = average.order(Vec::new(), true).unwrap();
        let second = average.order(vec![weight], true).unwrap();
        assert_eq!(second[0].wait().values::<f32>(), [-1.0, 6.0]);
        for kept in [first, skipped] {
            assert_eq!(kept[0].wait().values::<f32>(), [1.0, 8.0]);
        }
        assert!(average.order(Vec::new(), false).unwrap().is_empty());
    }

    #[test]
    fn a_thread_that_has_ended_leaves_nobody_waiting() {
        let average = Average::start(0.5, vec![Tensor::zeros(&[2])]).unwrap();
        // A mistake of the caller: another length.
        let awaited = average.order(vec![Tensor::zeros(&[1])], true).unwrap();
        let waited = RankError::catch(|| Ok(awaited[0].wait().len()));
        assert!(waited.unwrap_err().to_string().contains("the average of the weights"));
        assert!(average.order(Vec::new(), true).is_err());
    }
}
