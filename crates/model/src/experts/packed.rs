//! Experts as packed bytes, which processes exchange and stores hold.

use std::sync::Arc;

use bytes::Bytes;
use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{ExpertRole, Role};
use muster_kernels::{Biases, Expert, KernelError, Matrix};
use muster_types::{Compute, Gating, Packing, WeightDType, WeightDigest};

use crate::weights::packing;

/// One expert in host memory, packed identically by every process with the same compute mode and dtypes.
#[derive(Debug)]
pub struct PackedExpert(Expert);

impl From<Expert> for PackedExpert {
    fn from(expert: Expert) -> Self {
        Self(expert)
    }
}

impl PackedExpert {
    /// Its packed matrices, then its biases, each in the order gate, up, down.
    #[must_use]
    pub fn parts(&self) -> [&[u8]; 6] {
        self.0.packed()
    }

    /// The same parts without a copy: each shares ownership of the expert.
    #[must_use]
    pub fn shared(self: &Arc<Self>) -> [Bytes; 6] {
        std::array::from_fn(|part| Bytes::from_owner(SharedPart { expert: Arc::clone(self), part }))
    }

    /// Length of all parts, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// The digest of its parts.
    #[must_use]
    pub fn digest(&self) -> WeightDigest {
        WeightDigest::of(self.parts())
    }

    /// Weights for the kernels.
    pub(crate) const fn weights(&self) -> &Expert {
        &self.0
    }
}

struct SharedPart {
    expert: Arc<PackedExpert>,
    part: usize,
}

impl AsRef<[u8]> for SharedPart {
    fn as_ref(&self) -> &[u8] {
        self.expert.parts()[self.part]
    }
}

/// Form of a layer's packed experts: the meaning of their bytes in every process with the same compute mode and dtypes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertForm {
    /// Width of a hidden row, elements.
    pub hidden: usize,
    /// Width between the linears, elements.
    pub intermediate: usize,
    /// Packings of gate, up and down projection.
    pub packings: [Packing; 3],
    /// Activation between the linears.
    pub gating: Gating,
    /// Whether they have biases, in f32 behind the matrices.
    pub biases: bool,
}

impl ExpertForm {
    /// The form of each layer's experts, which all share it; `None` for a dense layer.
    #[must_use]
    pub fn of_layers(checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Vec<Option<Self>> {
        let spec = checkpoint.spec();
        let form = |layer: u32| {
            let moe = spec.moe(layer as usize)?;
            let packing = |role| {
                let stored = checkpoint.stored(Role::Expert(layer, 0, role))?;
                Some(packing(stored.form, compute, dtype))
            };
            let packings = [packing(ExpertRole::Gate)?, packing(ExpertRole::Up)?, packing(ExpertRole::Down)?];
            let (hidden, intermediate) = (spec.hidden, moe.intermediate);
            Some(Self { hidden, intermediate, packings, gating: moe.gating, biases: moe.biases })
        };
        (0..u32::try_from(spec.layers.len()).unwrap_or(u32::MAX)).map(form).collect()
    }

    /// Packing and shape of gate, up and down projection.
    fn parts(&self) -> [(Packing, usize, usize); 3] {
        let [gate, up, down] = self.packings;
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        [(gate, intermediate, hidden), (up, intermediate, hidden), (down, hidden, intermediate)]
    }

    /// Lengths of the biases of gate, up and down projection.
    fn bias_lengths(&self) -> [usize; 3] {
        if self.biases { [self.intermediate, self.intermediate, self.hidden] } else { [0; 3] }
    }

    /// Bytes of a packed expert; `None` on overflow.
    #[must_use]
    pub fn bytes(&self) -> Option<usize> {
        let matrices = self.parts().map(|(packing, n, k)| Matrix::packed_bytes(packing, n, k));
        let biases = self.bias_lengths().map(|length| length.checked_mul(size_of::<f32>()));
        matrices.into_iter().chain(biases).try_fold(0_usize, |sum, bytes| sum.checked_add(bytes?))
    }

    /// The expert's packed matrices and its biases, if it has this form.
    #[must_use]
    pub fn packed<'e>(&self, packed: &'e PackedExpert) -> Option<[&'e [u8]; 6]> {
        let expert = packed.weights();
        let form = (expert.packings(), expert.hidden(), expert.intermediate(), expert.gating());
        if form != (self.packings, self.hidden, self.intermediate, self.gating) {
            return None;
        }
        let biases = expert.biases().map(|b| [&b.gate, &b.up, &b.down].map(Vec::as_slice));
        let biases = biases.unwrap_or_default();
        (biases.map(<[f32]>::len) == self.bias_lengths()).then(|| packed.parts())
    }

    /// The expert with these packed matrices and biases, one behind the other.
    ///
    /// # Errors
    /// When the bytes are too few or too many, or are no weights.
    pub fn unpack(&self, bytes: &[u8]) -> Result<PackedExpert, KernelError> {
        let mut rest = bytes;
        let mut matrix = |(packing, n, k): (Packing, usize, usize)| {
            let own = Matrix::packed_bytes(packing, n, k).and_then(|own| rest.split_at_checked(own));
            let Some((own, more)) = own else { return Err(KernelError::Packed { n, k, bytes: rest.len() }) };
            rest = more;
            Matrix::from_packed(packing, n, k, own)
        };
        let [gate, up, down] = self.parts();
        let (gate, up, down) = (matrix(gate)?, matrix(up)?, matrix(down)?);
        let lengths = self.bias_lengths();
        if rest.len() != lengths.iter().sum::<usize>() * size_of::<f32>() {
            return Err(KernelError::Packed { n: down.n(), k: down.k(), bytes: down.bytes() + rest.len() });
        }
        let mut floats = rest.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let [gate_bias, up_bias, down_bias] = lengths.map(|length| floats.by_ref().take(length).collect());
        let biases = Biases { gate: gate_bias, up: up_bias, down: down_bias };
        let expert = Expert::new(gate, up, down)?.with(self.gating, self.biases.then_some(biases))?;
        Ok(expert.into())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use muster_checkpoint::Source;

    use super::*;
    use crate::experts::ExpertSet;

    #[test]
    fn an_expert_goes_through_its_bytes_unchanged() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden/mixtral");
        let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        for compute in [Compute::F32, Compute::Bf16] {
            for dtype in [WeightDType::Native, WeightDType::Q8, WeightDType::Q4] {
                let forms = ExpertForm::of_layers(&checkpoint, compute, dtype);
                let set = ExpertSet::load(&checkpoint, &keys[..3], compute, dtype, &mut |_| {}).unwrap();
                for &key in &keys[..3] {
                    let form = forms[key.layer.index()].unwrap();
                    let expert = set.get(key).unwrap();
                    let bytes = form.packed(&expert).expect("it has the layer's form").concat();
                    assert_eq!(form.bytes(), Some(bytes.len()));
                    assert_eq!(expert.bytes(), bytes.len());
                    assert_eq!(expert.shared().concat(), bytes);
                    let again = form.unpack(&bytes).unwrap();
                    assert_eq!(form.packed(&again).unwrap().concat(), bytes);
                    assert!(form.unpack(&bytes[1..]).is_err());
                    assert!(form.unpack(&[&bytes[..], &[0]].concat()).is_err());
                }
            }
        }
    }
}
