//! The parameters a rank holds: weight, gradient, the published names inside, and the ranks that hold a copy.
//!
//! The optimizer works on the master form of a weight, in F32; layers compute with its compute form. In F32 both are one
//! tensor. Where the compute form is narrower a rank keeps the masters of what it updates alone (report section 3.3.3), and every
//! copy of the weight is made of masters rounded to BF16: what other ranks send, and what the rank has itself, so that all copies
//! have the same bits. Knows nothing of layers and nothing of how gradients are reduced; it only says over whom (`group`).

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::OnceLock;

use contraflow_kernels::tensor::{Format, Tensor, View, ViewMut};

/// Index of a parameter in its [`Params`].
pub type ParamId = usize;

/// One published tensor inside a parameter's buffer. Gate and up projection, and the experts of a rank, are stacked
/// in one buffer so that one GEMM does them; in files they are separate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedTensor {
    /// Name as in the published checkpoints.
    pub name: String,
    /// Shape as published, row-major.
    pub shape: Vec<usize>,
    /// **Units**: elements from the start of the buffer.
    pub offset: usize,
}

impl PublishedTensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// **Units**: elements of the buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// One parameter.
pub struct Param {
    /// The published tensors inside, in buffer order, without gaps.
    pub parts: Vec<PublishedTensor>,
    shape: Vec<usize>,
    format: Format,
    /// Which elements this rank updates.
    owned: Range<usize>,
    /// Of all elements in F32, else of those that are owned.
    master: Tensor,
    /// Where it is narrower than F32.
    compute: OnceLock<Tensor>,
    /// Gradient of the running step; `None` is zero.
    pub grad: Option<Tensor>,
    /// All ranks that hold a copy, ascending: gradients are summed over them, the optimizer state is spread over them.
    pub group: Vec<usize>,
    /// Which flat bucket it is reduced in: parameters of one bucket have one group, and every member of the group gives
    /// the bucket this number.
    pub bucket: usize,
}

/// Over whom a parameter is replicated and in which bucket it is reduced.
#[derive(Clone, Debug)]
pub struct Replicas {
    /// See [`Param::group`].
    pub group: Vec<usize>,
    /// See [`Param::bucket`].
    pub bucket: usize,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is computed with in a format narrower than F32.
    pub fn is_narrow(&self) -> bool {
        self.format != Format::F32
    }

    /// The elements whose masters are here: all, unless the weight is narrow and other ranks update the rest.
    pub fn kept(&self) -> Range<usize> {
        if self.is_narrow() { self.owned.clone() } else { 0..self.len() }
    }

    /// Says which elements this rank updates, before there are any values.
    pub fn own(&mut self, owned: Range<usize>) {
        self.owned = owned;
        if self.is_narrow() && self.owned.len() < self.len() {
            self.master = Tensor::zeros(&[self.owned.len()]);
            self.compute.take();
        }
    }

    /// The masters that are [kept](Self::kept), in F32.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The masters, to be changed. What is computed with follows them where all are kept; where not it follows what is
    /// [received](Self::receive).
    pub fn master_mut(&mut self) -> &mut Tensor {
        if self.owned.len() == self.len() {
            self.compute.take();
        }
        &mut self.master
    }

    /// Some of the masters.
    ///
    /// # Panics
    /// If not all of them are kept.
    pub fn master_view(&self, range: Range<usize>) -> View<'_> {
        self.master.view(self.in_master(range))
    }

    /// Some of the masters, to be changed as [`master_mut`](Self::master_mut) says.
    ///
    /// # Panics
    /// If not all of them are kept.
    pub fn master_view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        let range = self.in_master(range);
        self.master_mut().view_mut(range)
    }

    /// Where a range of the elements lies among the masters.
    pub fn in_master(&self, range: Range<usize>) -> Range<usize> {
        let first = self.kept().start;
        range.start - first..range.end - first
    }

    /// Gives the weight its values: `read` writes each published tensor.
    ///
    /// **Errors**: those of `read`.
    pub fn fill<E>(
        &mut self,
        mut read: impl FnMut(&PublishedTensor, ViewMut) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.kept().len() == self.len() {
            self.compute.take();
            return self.parts.iter().try_for_each(|part| read(part, self.master.view_mut(part.range())));
        }
        let mut whole = Tensor::zeros(&self.shape);
        self.parts.iter().try_for_each(|part| read(part, whole.view_mut(part.range())))?;
        self.master = Tensor::from(whole.view(self.owned.clone()));
        self.compute = OnceLock::from(whole.to(Format::BF16).to(self.format));
        Ok(())
    }

    /// Takes over elements after an update: of other ranks in F32, or of all ranks, this one included, in BF16.
    ///
    /// # Panics
    /// If they have another format; if the weight is narrow and an element is missing.
    pub fn receive<'a>(&mut self, runs: impl Iterator<Item = (Range<usize>, View<'a>)>) {
        if !self.is_narrow() {
            return runs.for_each(|(range, values)| self.master.view_mut(range).copy_from(values));
        }
        // In BF16 the weight that is replaced gives its memory.
        let before = self.compute.take().filter(|before| before.format() == Format::BF16);
        let mut whole = before.unwrap_or_else(|| Tensor::for_overwrite_in(Format::BF16, &self.shape));
        let mut num_received = 0;
        for (range, values) in runs {
            num_received += range.len();
            whole.view_mut(range).copy_from(values);
        }
        assert_eq!(num_received, self.len(), "expected every element of {}", self.parts[0].name);
        self.compute = OnceLock::from(whole.to(self.format));
    }

    /// The weight as it is computed with.
    pub fn compute(&self) -> &Tensor {
        if !self.is_narrow() {
            return &self.master;
        }
        self.compute.get_or_init(|| {
            assert_eq!(self.owned.len(), self.len(), "expected weights of other ranks' shards");
            self.master.to(Format::BF16).to(self.format)
        })
    }

    /// The gradient, zero at first, to be added to.
    pub fn grad_mut(&mut self) -> &mut Tensor {
        self.grad.get_or_insert_with(|| Tensor::zeros(&self.shape))
    }

    /// Some of the masters, to be changed, and their gradient, zero at first.
    ///
    /// # Panics
    /// If not all of the masters are kept.
    pub fn master_and_grad(&mut self, range: Range<usize>) -> (ViewMut<'_>, View<'_>) {
        let in_master = self.in_master(range.clone());
        let Param { shape, master, compute, grad, .. } = self;
        compute.take();
        let grad = grad.get_or_insert_with(|| Tensor::zeros(shape));
        (master.view_mut(in_master), grad.view(range))
    }

    /// The published tensors that a range of the buffer touches: which, what range of the tensor, and what part of the
    /// given range that is.
    pub fn parts_in(
        &self,
        range: Range<usize>,
    ) -> impl Iterator<Item = (&PublishedTensor, Range<usize>, Range<usize>)> {
        self.parts.iter().filter_map(move |part| {
            let (from, to) = (range.start.max(part.offset), range.end.min(part.offset + part.len()));
            let within = |start: usize| from - start..to - start;
            (from < to).then(|| (part, within(part.offset), within(range.start)))
        })
    }

    /// Whether it is a matrix: weight decay may spare the others.
    pub fn is_matrix(&self) -> bool {
        self.parts[0].shape.len() > 1
    }
}

/// Parameters of one owner, and the gate biases of its layers.
#[derive(Default)]
pub struct Params {
    list: Vec<Param>,
    by_name: HashMap<String, ParamId>,
    is_outline: bool,
    /// `e_score_correction_bias` per layer, where gates have one: moved by the balance rule, never by a gradient.
    pub gate_biases: BTreeMap<usize, Tensor>,
    /// Tokens per routed expert since the start of the run, of every layer that has such experts.
    pub expert_counts: BTreeMap<usize, Vec<u64>>,
}

impl Params {
    /// Of parameters that have no values: what another rank holds is known from shapes alone.
    pub fn outline() -> Self {
        Params { is_outline: true, ..Params::default() }
    }

    /// Adds a parameter, or finds the one that already has this name: that is how a rank which holds both the first and
    /// the last stage shares embedding and head physically.
    ///
    /// `format` is that of the compute form.
    pub fn add(
        &mut self,
        shape: &[usize],
        parts: Vec<PublishedTensor>,
        format: Format,
        replicas: &Replicas,
    ) -> ParamId {
        if let Some(&id) = self.by_name.get(&parts[0].name) {
            return id;
        }
        let id = self.list.len();
        self.by_name.insert(parts[0].name.clone(), id);
        let Replicas { group, bucket } = replicas.clone();
        let values: &[usize] = if self.is_outline { &[0] } else { shape };
        let (master, compute) = (Tensor::zeros(values), OnceLock::new());
        let (owned, shape) = (0..shape.iter().product(), shape.to_vec());
        self.list.push(Param { parts, shape, format, owned, master, compute, grad: None, group, bucket });
        id
    }

    /// A parameter that is one published tensor.
    pub fn add_single(
        &mut self,
        name: String,
        shape: &[usize],
        format: Format,
        replicas: &Replicas,
    ) -> ParamId {
        self.add(shape, vec![PublishedTensor { name, shape: shape.to_vec(), offset: 0 }], format, replicas)
    }

    /// The weight as it is computed with.
    pub fn weight(&self, id: ParamId) -> &Tensor {
        self.list[id].compute()
    }

    /// The gradient, to be added to.
    pub fn grad_mut(&mut self, id: ParamId) -> &mut Tensor {
        self.list[id].grad_mut()
    }

    /// Weight and gradient of one parameter at once.
    pub fn weight_and_grad(&mut self, id: ParamId) -> (&Tensor, &mut Tensor) {
        let param = &mut self.list[id];
        param.compute();
        let Param { shape, master, compute, grad, .. } = param;
        let grad = grad.get_or_insert_with(|| Tensor::zeros(shape));
        (compute.get().unwrap_or(master), grad)
    }

    /// All parameters in a fixed order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.list.iter()
    }

    /// All parameters in the same order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        self.list.iter_mut()
    }

    /// One parameter, to be changed.
    pub fn get_mut(&mut self, id: ParamId) -> &mut Param {
        &mut self.list[id]
    }

    /// One parameter.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.list[id]
    }

    /// The ranks that hold a layer's gate, and with it the layer's bias and counts.
    pub fn gate_holders(&self, layer: usize) -> Option<&[usize]> {
        let gate = self.by_name.get(&format!("model.layers.{layer}.mlp.gate.weight"))?;
        Some(&self.list[*gate].group)
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

/// Where a parameter is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// [`RankParams::dense`].
    Dense,
    /// [`RankParams::experts`].
    Experts,
}

/// Both stores of a rank.
pub struct RankParams {
    /// Everything but the routed experts.
    pub dense: Params,
    /// The routed experts.
    pub experts: Params,
}

impl RankParams {
    /// One parameter.
    pub fn param(&self, store: Store, index: usize) -> &Param {
        match store {
            Store::Dense => self.dense.get(index),
            Store::Experts => self.experts.get(index),
        }
    }

    /// One parameter, to be changed.
    pub fn param_mut(&mut self, store: Store, index: usize) -> &mut Param {
        match store {
            Store::Dense => self.dense.get_mut(index),
            Store::Experts => self.experts.get_mut(index),
        }
    }

    /// All parameters, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        self.dense.iter_mut().chain(self.experts.iter_mut())
    }

    /// The parameters of a bucket, to be changed.
    pub fn in_bucket(&mut self, bucket: usize) -> impl Iterator<Item = &mut Param> {
        self.iter_mut().filter(move |param| param.bucket == bucket)
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) {
        self.iter_mut().for_each(|param| param.grad = None);
    }
}

/// The published name of a layer's gate bias.
pub fn gate_bias_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.gate.e_score_correction_bias")
}
