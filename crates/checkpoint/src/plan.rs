//! The bytes of each weight: every role that the configuration implies, matched with a tensor and checked.
//!
//! What always holds of a finished plan: every role's tensor exists, has the implied shape and a readable dtype, all
//! plain matrices share one dtype, the experts of a layer are stored alike, and no tensor is left over that would have
//! changed the output (the rule is at the top of the crate). Knows no family: they call [`PlanBuilder`] with names and
//! shapes; and no bytes: [`crate::read`] does.

use std::collections::BTreeMap;

use muster_types::DType;

use crate::catalog::{Catalog, Tensor};
use crate::error::CheckpointError;
use crate::header::Element;
use crate::spec::{ModelSpec, Role};
use crate::stored::{FP8_BLOCK, MXFP4_GROUP, StoredAs, StoredForms};

/// The head of a tied model, where it is stored again.
const TIED_HEAD: &str = "lm_head.weight";
/// Where one weight lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    /// Index into [`Catalog::tensors`].
    pub(crate) tensor: usize,
    pub(crate) rows: usize,
    /// 1 for vectors.
    pub(crate) cols: usize,
    pub(crate) kind: Kind,
    pub(crate) form: Form,
}

/// How a weight lies there.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// Numbers.
    Plain(Plain, Grid),
    /// A byte for each element, row by row; scales are a tensor of their own.
    Fp8 { offset: u64, scales: Scales },
    /// Groups of [`MXFP4_GROUP`] elements in 16 bytes, and a byte of scale each. The columns of both grids are groups.
    Mxfp4 { groups: Grid, scales: usize, scale_bytes: Grid },
}

/// Element (row, col) lies `row * row_step + col * col_step` elements behind the first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// First byte in the file.
    pub(crate) offset: u64,
    pub(crate) row_step: usize,
    pub(crate) col_step: usize,
}

/// The scales of a matrix in FP8.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scales {
    /// Index into [`Catalog::tensors`].
    pub(crate) tensor: usize,
    pub(crate) element: Plain,
}

/// Dtypes of plain numbers that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plain {
    F32,
    Bf16,
    F16,
}

impl Plain {
    const fn of(element: Element) -> Option<Self> {
        match element {
            Element::F32 => Some(Self::F32),
            Element::Bf16 => Some(Self::Bf16),
            Element::F16 => Some(Self::F16),
            Element::F8E4M3 | Element::U8 | Element::Other(..) => None,
        }
    }

    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    pub(crate) const fn stored_as(self) -> StoredAs {
        match self {
            Self::F32 => StoredAs::Plain(DType::F32),
            Self::Bf16 => StoredAs::Plain(DType::Bf16),
            Self::F16 => StoredAs::F16,
        }
    }
}

/// Matrices come in the model's dtype; others may be stored in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Matrix,
    /// A gate, which some publish in more bits than the rest.
    Gate,
    /// Norms and biases: widened when they are read.
    Vector,
}

impl Slice {
    pub(crate) fn elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }

    /// The tensors that it lies in.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = usize> {
        let scales = match self.form {
            Form::Plain(..) => None,
            Form::Fp8 { scales, .. } => Some(scales.tensor),
            Form::Mxfp4 { scales, .. } => Some(scales),
        };
        std::iter::once(self.tensor).chain(scales)
    }

    pub(crate) const fn stored_as(&self) -> StoredAs {
        match self.form {
            Form::Plain(plain, _) => plain.stored_as(),
            Form::Fp8 { .. } => StoredAs::Fp8,
            Form::Mxfp4 { .. } => StoredAs::Mxfp4,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.stored_as().bytes(self.rows, self.cols)
    }
}

/// Part of a tensor as a matrix: element (row, col) is number `first + row * row_step + col * col_step` of the tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_step: usize,
    pub(crate) col_step: usize,
}

impl View {
    /// `rows` rows of `cols` elements, from row `first_row` of a tensor that has rows of as many.
    pub(crate) const fn rows(first_row: usize, rows: usize, cols: usize) -> Self {
        Self { first: first_row * cols, rows, cols, row_step: cols, col_step: 1 }
    }

    /// Every second row of a tensor that has rows of `cols` elements, beginning with row `first_row`.
    pub(crate) const fn alternate_rows(first_row: usize, rows: usize, cols: usize) -> Self {
        Self { first: first_row * cols, rows, cols, row_step: 2 * cols, col_step: 1 }
    }

    /// `rows` by `cols` from `first`, which lie column by column.
    pub(crate) const fn transposed(first: usize, rows: usize, cols: usize) -> Self {
        Self { first, rows, cols, row_step: 1, col_step: rows }
    }

    /// As many elements from `first`, every `step`th.
    pub(crate) const fn vector(first: usize, length: usize, step: usize) -> Self {
        Self { first, rows: length, cols: 1, row_step: step, col_step: 1 }
    }
}

/// Roles to their bytes.
pub(crate) type Plan = BTreeMap<Role, Slice>;

/// A plan in the making.
pub(crate) struct PlanBuilder<'a> {
    catalog: &'a Catalog,
    /// Before every name.
    prefix: &'static str,
    plain: Plain,
    /// Matrices may be stored in FP8.
    fp8: bool,
    slices: Plan,
    used: Vec<bool>,
}

impl<'a> PlanBuilder<'a> {
    /// A plan whose plain matrices must all be stored as `plain`.
    pub(crate) fn new(
        catalog: &'a Catalog,
        prefix: &'static str,
        plain: Plain,
        stored: &StoredForms,
    ) -> Self {
        let fp8 = stored.linears == StoredAs::Fp8;
        Self { catalog, prefix, plain, fp8, slices: Plan::new(), used: vec![false; catalog.tensors.len()] }
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.catalog.find(&format!("{}{name}", self.prefix)).is_some()
    }

    /// A whole tensor `[rows, cols]`.
    pub(crate) fn matrix(
        &mut self,
        role: Role,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<(), CheckpointError> {
        self.view(role, name, &[rows, cols], Kind::Matrix, View::rows(0, rows, cols))
    }

    /// A whole tensor `[experts, hidden]` that chooses experts.
    pub(crate) fn gate(
        &mut self,
        role: Role,
        name: &str,
        experts: usize,
        hidden: usize,
    ) -> Result<(), CheckpointError> {
        self.view(role, name, &[experts, hidden], Kind::Gate, View::rows(0, experts, hidden))
    }

    /// A whole tensor `[length]`.
    pub(crate) fn vector(&mut self, role: Role, name: &str, length: usize) -> Result<(), CheckpointError> {
        self.view(role, name, &[length], Kind::Vector, View::vector(0, length, 1))
    }

    /// A whole tensor `[1, length]` that is a vector.
    pub(crate) fn row(&mut self, role: Role, name: &str, length: usize) -> Result<(), CheckpointError> {
        self.view(role, name, &[1, length], Kind::Vector, View::vector(0, length, 1))
    }

    /// Part of a tensor of this shape.
    pub(crate) fn view(
        &mut self,
        role: Role,
        name: &str,
        shape: &[usize],
        kind: Kind,
        view: View,
    ) -> Result<(), CheckpointError> {
        let at = self.find(role, name, shape)?;
        let tensor = &self.catalog.tensors[at];
        let unsupported = || self.unsupported(tensor, role);
        let form = match Plain::of(tensor.element) {
            Some(plain) if kind == Kind::Matrix && plain != self.plain => {
                return Err(self.mixed(tensor, role));
            }
            Some(plain) => Form::Plain(plain, view.grid(tensor.offset, plain.size())),
            // Only whole matrices have blocks that start where the matrix does.
            None if kind == Kind::Matrix && self.fp8 && shape == [view.rows, view.cols] => {
                if tensor.element != Element::F8E4M3 {
                    return Err(unsupported());
                }
                let offset = tensor.offset;
                let blocks = [view.rows.div_ceil(FP8_BLOCK), view.cols.div_ceil(FP8_BLOCK)];
                let scales = self.find(role, &format!("{name}_scale_inv"), &blocks)?;
                let tensor = &self.catalog.tensors[scales];
                let element = Plain::of(tensor.element).ok_or_else(|| self.unsupported(tensor, role))?;
                self.used[scales] = true;
                Form::Fp8 { offset, scales: Scales { tensor: scales, element } }
            }
            None => return Err(unsupported()),
        };
        self.used[at] = true;
        self.slices.insert(role, Slice { tensor: at, rows: view.rows, cols: view.cols, kind, form });
        Ok(())
    }

    /// Part of a pair of tensors in MXFP4: `{name}_blocks` `[matrices, rows, groups, 16]` and `{name}_scales` `[matrices,
    /// rows, groups]`, of which `view` shows what it would of `[matrices, rows, groups * 32]` plain elements.
    pub(crate) fn mxfp4(
        &mut self,
        role: Role,
        name: &str,
        [matrices, rows, cols]: [usize; 3],
        view: View,
    ) -> Result<(), CheckpointError> {
        let groups = cols / MXFP4_GROUP;
        let blocks = self.find(role, &format!("{name}_blocks"), &[matrices, rows, groups, 16])?;
        let scales = self.find(role, &format!("{name}_scales"), &[matrices, rows, groups])?;
        for at in [blocks, scales] {
            let tensor = &self.catalog.tensors[at];
            if tensor.element != Element::U8 {
                return Err(self.unsupported(tensor, role));
            }
            self.used[at] = true;
        }
        let in_groups = View {
            first: view.first / MXFP4_GROUP,
            row_step: view.row_step / MXFP4_GROUP,
            cols: groups,
            ..view
        };
        let form = Form::Mxfp4 {
            groups: in_groups.grid(self.catalog.tensors[blocks].offset, 16),
            scales,
            scale_bytes: in_groups.grid(self.catalog.tensors[scales].offset, 1),
        };
        let slice = Slice { tensor: blocks, rows: view.rows, cols: view.cols, kind: Kind::Matrix, form };
        self.slices.insert(role, slice);
        Ok(())
    }

    /// The tensor of this name, if it has this shape.
    fn find(&self, role: Role, name: &str, expected: &[usize]) -> Result<usize, CheckpointError> {
        let name = format!("{}{name}", self.prefix);
        let Some(at) = self.catalog.find(&name) else {
            return Err(CheckpointError::MissingTensor { tensor: name, role });
        };
        let tensor = &self.catalog.tensors[at];
        if tensor.shape == expected {
            return Ok(at);
        }
        let (file, tensor, found) =
            (self.catalog.shard_name(tensor).to_owned(), tensor.name.clone(), tensor.shape.clone());
        Err(CheckpointError::Shape { file, tensor, role, found, expected: expected.to_vec() })
    }

    fn unsupported(&self, tensor: &Tensor, role: Role) -> CheckpointError {
        let (file, name) = (self.catalog.shard_name(tensor).to_owned(), tensor.name.clone());
        CheckpointError::UnsupportedDtype { file, tensor: name, role, found: tensor.element.name() }
    }

    fn mixed(&self, tensor: &Tensor, role: Role) -> CheckpointError {
        let (file, name) = (self.catalog.shard_name(tensor).to_owned(), tensor.name.clone());
        CheckpointError::MixedDtype { file, tensor: name, role, found: tensor.element.name() }
    }

    /// The plan, if experts of a layer are stored alike and no tensor is left over that matters.
    pub(crate) fn finish(self, spec: &ModelSpec) -> Result<Plan, CheckpointError> {
        for (&role, slice) in &self.slices {
            if let Role::Expert(layer, _, part) = role
                && let Some(first) = self.slices.get(&Role::Expert(layer, 0, part))
                && first.stored_as() != slice.stored_as()
            {
                return Err(self.mixed(&self.catalog.tensors[slice.tensor], role));
            }
        }
        for (at, tensor) in self.catalog.tensors.iter().enumerate().filter(|&(at, _)| !self.used[at]) {
            let Some(inner) = tensor.name.strip_prefix(self.prefix) else { continue };
            let unused = spec.unused.iter().any(|prefix| inner.starts_with(prefix));
            if matters(inner) && !unused && !self.is_embedding_again(at, inner, spec)? {
                return Err(self.left_over(tensor, inner, spec));
            }
        }
        Ok(self.slices)
    }

    /// Whether a tensor is the head that a tied model has stored beside its embedding, byte for byte.
    fn is_embedding_again(&self, at: usize, inner: &str, spec: &ModelSpec) -> Result<bool, CheckpointError> {
        match self.slices.get(&Role::Embedding) {
            Some(embedding) if spec.tied_head && inner == TIED_HEAD => {
                self.catalog.are_equal(at, embedding.tensor)
            }
            _ => Ok(false),
        }
    }

    /// Why a tensor that no role has cannot be left alone.
    fn left_over(&self, tensor: &Tensor, inner: &str, spec: &ModelSpec) -> CheckpointError {
        let (file, name) = (self.catalog.shard_name(tensor).to_owned(), tensor.name.clone());
        if spec.tied_head && inner == TIED_HEAD {
            return CheckpointError::TwoHeads { file, tensor: name };
        }
        match foreign_expert(inner, spec) {
            Some((layer, expert, experts)) => {
                CheckpointError::ForeignExpert { file, tensor: name, layer, expert, experts }
            }
            None => CheckpointError::UnplannedTensor { file, tensor: name, family: spec.family },
        }
    }
}

impl View {
    const fn grid(self, tensor: u64, size: usize) -> Grid {
        let Self { first, row_step, col_step, .. } = self;
        Grid { offset: tensor + (first * size) as u64, row_step, col_step }
    }
}

/// Whether a model served without this tensor would give other output than its authors meant.
fn matters(name: &str) -> bool {
    let inside = name.starts_with("model.") || name.starts_with("lm_head.");
    inside && !name.ends_with(".rotary_emb.inv_freq")
}

/// Layer and number of the expert that a tensor belongs to and how many there are, if it is one too many.
fn foreign_expert(name: &str, spec: &ModelSpec) -> Option<(u32, u32, u32)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, rest) = rest.split_once("experts.")?;
    let (layer, expert): (u32, u32) = (layer.parse().ok()?, rest.split_once('.')?.0.parse().ok()?);
    let experts = spec.moe(layer as usize)?.experts;
    (expert >= experts).then_some((layer, expert, experts))
}

/// Dtype of the checkpoint's plain matrices: that of the embedding, or of the first one that is readable. Whether all
/// agree is for the plan to check, which knows what each of them is.
pub(crate) fn plain_dtype(catalog: &Catalog, prefix: &str) -> Plain {
    let matrix = |tensor: &Tensor| {
        let is_one = tensor.shape.len() > 1 && !tensor.shape.contains(&0);
        if is_one { Plain::of(tensor.element) } else { None }
    };
    let embedding = catalog.find(&format!("{prefix}model.embed_tokens.weight"));
    let embedding = embedding.map(|at| &catalog.tensors[at]);
    embedding.into_iter().chain(&catalog.tensors).find_map(matrix).unwrap_or(Plain::F32)
}
