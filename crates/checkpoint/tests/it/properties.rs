//! The header parser on arbitrary and on slightly wrong bytes: no panic, and nothing accepted that the format's own
//! library refuses or that does not cover the file.

use std::collections::HashMap;

use muster_checkpoint::header::{TensorInfo, json_length, parse};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::model::{Model, header_text, with_header};

/// Parses a whole file as the crate does.
fn parse_file(bytes: &[u8]) -> Option<Vec<TensorInfo>> {
    let first = bytes.get(..8)?.try_into().ok()?;
    let length = json_length(first, bytes.len() as u64).ok()?;
    parse(&bytes[8..8 + length], (bytes.len() - 8 - length) as u64).ok()
}

/// What must hold of anything that was accepted.
fn check_accepted(bytes: &[u8], tensors: &[TensorInfo]) {
    let reference = SafeTensors::deserialize(bytes).expect("the format's own library accepts it too");
    assert_eq!(reference.len(), tensors.len());
    let mut end = 0;
    for tensor in tensors {
        assert_eq!(tensor.begin, end);
        end = tensor.end;
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.end - tensor.begin, elements as u64 * tensor.element.size());
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!(
            (view.shape(), view.data().len() as u64),
            (tensor.shape.as_slice(), tensor.end - tensor.begin)
        );
    }
}

fn small_header() -> Vec<u8> {
    let tensors: Vec<_> = Model::mixtral().shards[1].1.iter().take(4).cloned().collect();
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    with_header(header_text(&tensors).as_bytes(), &data)
}

/// Texts that a header is made of, well-formed and not.
fn fragment() -> impl Strategy<Value = String> {
    const KNOWN: [&str; 26] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "null",
        "-1",
        "0",
        "4",
        "8",
        "1e9",
        "18446744073709551615",
        "\"F32\"",
        "\"dtype\"",
        "\"shape\"",
        "\"data_offsets\"",
        "\"__metadata__\"",
        "[0,4]",
        "[1]",
        "\"a\"",
        " ",
        "\\u0000",
        "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}",
        "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}",
    ];
    prop::sample::select(KNOWN.as_slice()).prop_map(str::to_owned)
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256), data in any::<u64>()) {
        let _ = parse_file(&bytes);
        let _ = parse(&bytes, data);
    }

    #[test]
    fn arbitrary_fragments_never_panic(parts in prop::collection::vec(fragment(), 0..40), data in 0u64..16) {
        let text = format!("{{{}", parts.concat());
        if let Ok(tensors) = parse(text.as_bytes(), data) {
            check_accepted(&with_header(text.as_bytes(), &vec![0; data as usize]), &tensors);
        }
    }

    #[test]
    fn damaged_files_are_refused_or_still_sound(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = small_header();
        for (at, byte) in edits {
            let at = at.index(bytes.len().min(600));
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Some(tensors) = parse_file(&bytes) {
            check_accepted(&bytes, &tensors);
        }
    }

    #[test]
    fn what_the_library_writes_is_accepted(
        shapes in prop::collection::vec((prop::collection::vec(0usize..5, 0..4), any::<bool>()), 1..6),
    ) {
        let buffers: Vec<Vec<u8>> = shapes
            .iter()
            .map(|(shape, wide)| vec![7; shape.iter().product::<usize>() * if *wide { 4 } else { 2 }])
            .collect();
        let views = shapes.iter().zip(&buffers).enumerate().map(|(i, ((shape, wide), data))| {
            let dtype = if *wide { Dtype::F32 } else { Dtype::BF16 };
            (format!("t{i}"), TensorView::new(dtype, shape.clone(), data).unwrap())
        });
        let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
        let bytes = safetensors::serialize(views, metadata).unwrap();
        let tensors = parse_file(&bytes).expect("a file of the format's own library is accepted");
        prop_assert_eq!(tensors.len(), shapes.len());
        check_accepted(&bytes, &tensors);
    }
}
