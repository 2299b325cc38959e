//! How the parameters of a rank lie in flat buckets: one for all that is reduced together, cut into one shard per holder.
//!
//! Knows parameters and groups; nothing of gradients' way or of the update.

use std::collections::BTreeMap;
use std::ops::Range;

use contraflow_kernels::tensor::{Format, Tensor, View};
use contraflow_runtime::topology::collective::shard;

use crate::model::params::{Param, RankParams, Store};

/// The parameters of one replica group that are reduced together, as one flat run of elements.
pub struct Bucket {
    /// See [`Param::bucket`].
    pub number: usize,
    /// See [`Param::group`].
    pub group: Vec<usize>,
    /// Which parameters: store, index, first element in the bucket. Those that are computed with in F32 come first.
    pub members: Vec<(Store, usize, usize)>,
    /// Number of elements.
    pub len: usize,
    /// Number of elements that are computed with in F32, and gathered so; the rest is gathered in BF16.
    pub wide: usize,
    /// This rank's part of the bucket.
    pub shard: Range<usize>,
    /// First moment of the shard.
    pub exp_avg: Tensor,
    /// Second moment of the shard.
    pub exp_avg_sq: Tensor,
}

/// The replica group of a bucket.
#[derive(Clone, Debug)]
pub struct BucketGroup {
    /// The ranks that hold it, ascending.
    pub ranks: Vec<usize>,
    /// Number of elements.
    pub len: usize,
    /// See [`Bucket::wide`].
    pub wide: usize,
}

impl BucketGroup {
    /// The runs, each of one format, in which the shard of the member with this index is gathered.
    pub fn runs(&self, member: usize) -> Vec<(Range<usize>, Format)> {
        let Range { start, end } = shard(self.len, self.ranks.len(), member);
        let middle = self.wide.clamp(start, end);
        let (wide, narrow) = ((start..middle, Format::F32), (middle..end, Format::BF16));
        // An empty shard is one empty run.
        let has_wide = !wide.0.is_empty() || narrow.0.is_empty();
        let (wide, narrow) = (has_wide.then_some(wide), Some(narrow).filter(|(run, _)| !run.is_empty()));
        wide.into_iter().chain(narrow).collect()
    }
}

/// A piece of a bucket that lies in one parameter.
pub struct BucketSlice {
    /// Where the parameter is kept.
    pub store: Store,
    /// Its place there.
    pub index: usize,
    /// Which elements of the parameter.
    pub in_param: Range<usize>,
    /// Relative to the start of the range that was asked for.
    pub in_range: Range<usize>,
}

impl Bucket {
    /// The bucket of a parameter, before any is in it.
    fn empty(param: &Param) -> Self {
        let (exp_avg, exp_avg_sq) = (Tensor::zeros(&[0]), Tensor::zeros(&[0]));
        let (number, group) = (param.bucket, param.group.clone());
        Bucket { number, group, members: Vec::new(), len: 0, wide: 0, shard: 0..0, exp_avg, exp_avg_sq }
    }

    /// The buckets of a rank's parameters by their numbers, each with the rank's shard, and without moments.
    pub fn all_of(params: &RankParams, rank: usize) -> Vec<Self> {
        let mut buckets: BTreeMap<usize, Bucket> = BTreeMap::new();
        for is_narrow in [false, true] {
            for (store, list) in [(Store::Dense, &params.dense), (Store::Experts, &params.experts)] {
                for (index, param) in list.iter().enumerate().filter(|(_, p)| p.is_narrow() == is_narrow) {
                    let bucket = buckets.entry(param.bucket).or_insert_with(|| Bucket::empty(param));
                    bucket.add((store, index), param);
                }
            }
        }
        for bucket in buckets.values_mut() {
            let own = bucket.group.iter().position(|&member| member == rank).unwrap_or_default();
            bucket.shard = shard(bucket.len, bucket.group.len(), own);
        }
        buckets.into_values().collect()
    }

    /// Adds a parameter; those in F32 first.
    fn add(&mut self, (store, index): (Store, usize), param: &Param) {
        self.members.push((store, index, self.len));
        self.len += param.len();
        if !param.is_narrow() {
            self.wide = self.len;
        }
    }

    /// The ranks that hold it, and in what runs it is gathered.
    pub fn group(&self) -> BucketGroup {
        BucketGroup { ranks: self.group.clone(), len: self.len, wide: self.wide }
    }

    /// Gives the rank zero moments of its shard, in a format.
    pub fn make_moments(&mut self, moments: Format) {
        self.exp_avg = Tensor::zeros_in(moments, &[self.shard.len()]);
        self.exp_avg_sq = self.exp_avg.clone();
    }

    /// What a range of the bucket is made of.
    pub fn pieces(&self, range: &Range<usize>, params: &RankParams) -> Vec<BucketSlice> {
        let mut pieces = Vec::new();
        for &(store, index, start) in &self.members {
            let end = start + params.param(store, index).len();
            let from = start.max(range.start);
            let to = end.min(range.end);
            if from < to {
                let in_range = from - range.start..to - range.start;
                pieces.push(BucketSlice { store, index, in_param: from - start..to - start, in_range });
            }
        }
        pieces
    }

    /// Copies a range of the bucket out of the parameters' masters or gradients.
    pub fn slice<'a>(
        &self,
        params: &'a RankParams,
        range: Range<usize>,
        values: impl Fn(&'a Param, Range<usize>) -> Option<View<'a>>,
    ) -> Tensor {
        let mut flat = Tensor::zeros(&[range.len()]);
        for BucketSlice { store, index, in_param, in_range } in self.pieces(&range, params) {
            if let Some(source) = values(params.param(store, index), in_param) {
                flat.view_mut(in_range).copy_from(source);
            }
        }
        flat
    }
}
