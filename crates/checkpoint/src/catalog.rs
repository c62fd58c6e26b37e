//! Every shard's header in one table: which tensor lies where, and whether index and shards agree.
//!
//! What always holds: a tensor is in one shard only, the index (if there is one) lists exactly the tensors that the
//! shards have, and every range lies inside its file. Knows nothing about what tensors mean.

use std::collections::BTreeSet;

use crate::error::CheckpointError;
use crate::files::{Blob, Files};
use crate::header::{self, Element, TensorInfo};
use crate::identity::Identity;
use crate::index::{self, INDEX_FILE, IndexError, LONGEST_INDEX, SINGLE_FILE, WeightMap};
use crate::untrusted::clip;

/// One tensor of the checkpoint.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Index into [`Catalog::shards`].
    pub(crate) shard: usize,
    pub(crate) element: Element,
    pub(crate) shape: Vec<usize>,
    /// First byte in the file.
    pub(crate) offset: u64,
}

impl Tensor {
    /// Bytes of all its elements.
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product::<u64>() * self.element.size()
    }
}

/// All shards and their tensors.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub(crate) shards: Vec<Blob>,
    /// Ascending by name.
    pub(crate) tensors: Vec<Tensor>,
}

impl Catalog {
    /// Reads index and headers, and adds them to the model's identity.
    pub(crate) fn read(files: &Files, identity: &mut Identity) -> Result<Self, CheckpointError> {
        let weight_map = match files.read_whole(INDEX_FILE, LONGEST_INDEX)? {
            None => None,
            Some(bytes) => {
                identity.part("index", &bytes);
                Some(index::parse(&bytes).map_err(CheckpointError::Index)?)
            }
        };
        let names = match &weight_map {
            Some(weight_map) => index::shards(weight_map).map_err(CheckpointError::Index)?,
            None => BTreeSet::from([SINGLE_FILE.to_owned()]),
        };
        let mut catalog = Self { shards: Vec::with_capacity(names.len()), tensors: Vec::new() };
        for name in names {
            match (files.file(&name)?, &weight_map) {
                (Some(shard), _) => catalog.add(shard, identity)?,
                (None, Some(_)) => return Err(CheckpointError::Index(IndexError::MissingShard(name))),
                (None, None) => return Err(CheckpointError::NoWeights),
            }
        }
        catalog.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        catalog.refuse_duplicates().map_err(CheckpointError::Index)?;
        if let Some(weight_map) = &weight_map {
            catalog.compare(weight_map).map_err(CheckpointError::Index)?;
        }
        Ok(catalog)
    }

    fn add(&mut self, shard: Blob, identity: &mut Identity) -> Result<(), CheckpointError> {
        let (bytes, tensors) = read_header(&shard)?;
        identity.part("shard", shard.name.as_bytes());
        identity.part("length", &shard.length.to_le_bytes());
        identity.part("header", &bytes);
        let data = header::PREFIX + bytes.len() as u64;
        let index = self.shards.len();
        self.tensors.extend(tensors.into_iter().map(|TensorInfo { name, element, shape, begin, .. }| {
            Tensor { name, shard: index, element, shape, offset: data + begin }
        }));
        self.shards.push(shard);
        Ok(())
    }

    fn refuse_duplicates(&self) -> Result<(), IndexError> {
        match self.tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            None => Ok(()),
            Some(pair) => Err(IndexError::TwoShards {
                tensor: pair[0].name.clone(),
                first: self.shard_name(&pair[0]).to_owned(),
                second: self.shard_name(&pair[1]).to_owned(),
            }),
        }
    }

    fn compare(&self, weight_map: &WeightMap) -> Result<(), IndexError> {
        for (name, shard) in weight_map {
            if self.find(name).is_none_or(|at| self.shard_name(&self.tensors[at]) != shard) {
                return Err(IndexError::Absent { tensor: clip(name), shard: shard.clone() });
            }
        }
        match self.tensors.iter().find(|tensor| !weight_map.contains_key(&tensor.name)) {
            None => Ok(()),
            Some(tensor) => {
                let (shard, tensor) = (self.shard_name(tensor).to_owned(), tensor.name.clone());
                Err(IndexError::Unlisted { tensor, shard })
            }
        }
    }

    /// Position of the tensor of this name.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Whether two tensors have the same shape, dtype and bytes. Reads them piece by piece.
    pub(crate) fn are_equal(&self, one: usize, other: usize) -> Result<bool, CheckpointError> {
        const PIECE: usize = 1 << 20;
        let (one, other) = (&self.tensors[one], &self.tensors[other]);
        if (one.element, &one.shape) != (other.element, &other.shape) {
            return Ok(false);
        }
        // The header was found to cover its file, so its tensors' bytes can be counted.
        let length = one.bytes();
        let piece = usize::try_from(length).map_or(PIECE, |length| length.min(PIECE));
        let mut buffers = [vec![0; piece], vec![0; piece]];
        let mut done = 0;
        while done < length {
            let now = usize::try_from(length - done).map_or(piece, |left| left.min(piece));
            for (tensor, buffer) in [one, other].into_iter().zip(&mut buffers) {
                self.shards[tensor.shard].read_at(tensor.offset + done, &mut buffer[..now])?;
            }
            if buffers[0][..now] != buffers[1][..now] {
                return Ok(false);
            }
            done += now as u64;
        }
        Ok(true)
    }

    /// Name of the shard that has this tensor.
    pub(crate) fn shard_name(&self, tensor: &Tensor) -> &str {
        &self.shards[tensor.shard].name
    }
}

fn read_header(shard: &Blob) -> Result<(Vec<u8>, Vec<TensorInfo>), CheckpointError> {
    let fail = |problem| CheckpointError::Header { file: shard.name.clone(), problem };
    if shard.length < header::PREFIX {
        return Err(fail(header::HeaderError::TooShort(shard.length)));
    }
    let mut first = [0; 8];
    shard.read_at(0, &mut first)?;
    let length = header::json_length(first, shard.length).map_err(fail)?;
    let mut json = vec![0; length];
    shard.read_at(header::PREFIX, &mut json)?;
    let tensors = header::parse(&json, shard.length - header::PREFIX - length as u64).map_err(fail)?;
    Ok((json, tensors))
}
