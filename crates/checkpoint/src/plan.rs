//! Which bytes are which weight: every role the configuration implies, matched with a tensor and checked.
//!
//! What always holds of a finished plan: every role's tensor exists, has the implied shape and a readable dtype, all
//! matrices share one dtype, and no tensor is left over that would have changed the output (the rule is at the top of
//! the crate). Knows no family: they call [`PlanBuilder`] with names and shapes.

use std::collections::BTreeMap;

use muster_types::DType;

use crate::catalog::{Catalog, Tensor};
use crate::error::CheckpointError;
use crate::header::Element;
use crate::spec::{ModelSpec, Role};

/// Where one weight lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    /// Index into [`Catalog::tensors`].
    pub(crate) tensor: usize,
    /// First byte in the file.
    pub(crate) offset: u64,
    pub(crate) rows: usize,
    /// 1 for vectors.
    pub(crate) cols: usize,
    pub(crate) kind: Kind,
    pub(crate) dtype: DType,
}

/// Matrices come in the model's dtype; vectors (norms and biases) may be stored in another and are widened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Matrix,
    Vector,
}

impl Slice {
    pub(crate) fn elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }
}

/// Rows of one matrix in a stack of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Which matrix.
    pub(crate) index: usize,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
}

/// Roles to their bytes.
pub(crate) type Plan = BTreeMap<Role, Slice>;

/// A plan in the making.
pub(crate) struct PlanBuilder<'a> {
    catalog: &'a Catalog,
    dtype: DType,
    slices: Plan,
    used: Vec<bool>,
}

impl<'a> PlanBuilder<'a> {
    /// A plan whose matrices must all be stored as `dtype`.
    pub(crate) fn new(catalog: &'a Catalog, dtype: DType) -> Self {
        Self { catalog, dtype, slices: Plan::new(), used: vec![false; catalog.tensors.len()] }
    }

    /// A whole tensor `[rows, cols]`.
    pub(crate) fn matrix(
        &mut self,
        role: Role,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<(), CheckpointError> {
        let (tensor, dtype) = self.take(role, name, &[rows, cols], Kind::Matrix)?;
        let offset = self.catalog.tensors[tensor].offset;
        self.slices.insert(role, Slice { tensor, offset, rows, cols, kind: Kind::Matrix, dtype });
        Ok(())
    }

    /// A whole tensor `[length]`.
    pub(crate) fn vector(&mut self, role: Role, name: &str, length: usize) -> Result<(), CheckpointError> {
        let (tensor, dtype) = self.take(role, name, &[length], Kind::Vector)?;
        let offset = self.catalog.tensors[tensor].offset;
        self.slices.insert(role, Slice { tensor, offset, rows: length, cols: 1, kind: Kind::Vector, dtype });
        Ok(())
    }

    /// A whole tensor `[1, length]` that is a vector.
    pub(crate) fn row(&mut self, role: Role, name: &str, length: usize) -> Result<(), CheckpointError> {
        let (tensor, dtype) = self.take(role, name, &[1, length], Kind::Vector)?;
        let offset = self.catalog.tensors[tensor].offset;
        self.slices.insert(role, Slice { tensor, offset, rows: length, cols: 1, kind: Kind::Vector, dtype });
        Ok(())
    }

    /// Some rows of a whole tensor of `shape` `[rows, cols]`.
    pub(crate) fn rows(
        &mut self,
        role: Role,
        name: &str,
        shape: [usize; 2],
        [first_row, rows]: [usize; 2],
    ) -> Result<(), CheckpointError> {
        let (tensor, dtype) = self.take(role, name, &shape, Kind::Matrix)?;
        let skipped = first_row as u64 * shape[1] as u64 * dtype.size() as u64;
        let offset = self.catalog.tensors[tensor].offset + skipped;
        self.slices.insert(role, Slice { tensor, offset, rows, cols: shape[1], kind: Kind::Matrix, dtype });
        Ok(())
    }

    /// Some rows of one matrix of a tensor of `shape` `[matrices, rows, cols]`.
    pub(crate) fn part(
        &mut self,
        role: Role,
        name: &str,
        shape: [usize; 3],
        part: Part,
    ) -> Result<(), CheckpointError> {
        let (tensor, dtype) = self.take(role, name, &shape, Kind::Matrix)?;
        let [_, rows, cols] = shape.map(|dimension| dimension as u64);
        let first = (part.index as u64 * rows + part.first_row as u64) * cols;
        let offset = self.catalog.tensors[tensor].offset + first * dtype.size() as u64;
        let slice = Slice { tensor, offset, rows: part.rows, cols: shape[2], kind: Kind::Matrix, dtype };
        self.slices.insert(role, slice);
        Ok(())
    }

    fn take(
        &mut self,
        role: Role,
        name: &str,
        expected: &[usize],
        kind: Kind,
    ) -> Result<(usize, DType), CheckpointError> {
        let missing = || CheckpointError::MissingTensor { tensor: name.to_owned(), role };
        let at = self.catalog.find(name).ok_or_else(missing)?;
        let tensor = &self.catalog.tensors[at];
        let file = || self.catalog.shard_name(tensor).to_owned();
        let name = || tensor.name.clone();
        let found = tensor.element.name();
        if tensor.shape != expected {
            let (found, expected) = (tensor.shape.clone(), expected.to_vec());
            return Err(CheckpointError::Shape { file: file(), tensor: name(), role, found, expected });
        }
        let Some(dtype) = readable(tensor.element) else {
            return Err(CheckpointError::UnsupportedDtype { file: file(), tensor: name(), role, found });
        };
        if kind == Kind::Matrix && dtype != self.dtype {
            return Err(CheckpointError::MixedDtype { file: file(), tensor: name(), role, found });
        }
        self.used[at] = true;
        Ok((at, dtype))
    }

    /// The plan, if no tensor is left over that matters.
    pub(crate) fn finish(self, spec: &ModelSpec) -> Result<Plan, CheckpointError> {
        let unused = |name: &str| spec.unused.iter().any(|prefix| name.starts_with(prefix));
        let left = self.catalog.tensors.iter().zip(&self.used).filter(|(_, used)| !**used);
        let mut left = left.map(|(tensor, _)| tensor).filter(|tensor| !unused(&tensor.name));
        match left.find(|tensor| matters(&tensor.name, spec.tied_head)) {
            None => Ok(self.slices),
            Some(tensor) => {
                let (file, tensor) = (self.catalog.shard_name(tensor).to_owned(), tensor.name.clone());
                Err(CheckpointError::UnplannedTensor { file, tensor, family: spec.family })
            }
        }
    }
}

/// Whether a model served without this tensor would give other output than its authors meant.
fn matters(name: &str, tied_head: bool) -> bool {
    let inside = name.starts_with("model.") || name.starts_with("lm_head.");
    inside && !name.ends_with(".rotary_emb.inv_freq") && !(tied_head && name == "lm_head.weight")
}

fn readable(element: Element) -> Option<DType> {
    match element {
        Element::F32 => Some(DType::F32),
        Element::Bf16 => Some(DType::Bf16),
        Element::Other(..) => None,
    }
}

/// Dtype of the checkpoint's matrices: that of the first one that is readable. Whether all agree is for the plan to
/// check, which knows what each of them is.
pub(crate) fn matrix_dtype(catalog: &Catalog) -> DType {
    let matrix = |tensor: &Tensor| if tensor.shape.len() > 1 { readable(tensor.element) } else { None };
    catalog.tensors.iter().find_map(matrix).unwrap_or(DType::F32)
}
