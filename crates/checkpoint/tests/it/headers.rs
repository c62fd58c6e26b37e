//! Shard files: every way a safetensors file can contradict itself, seen through [`Checkpoint::open`].

use std::fs;

use muster_checkpoint::header::{LONGEST_HEADER, LONGEST_METADATA};

use crate::model::{FIRST, Model, SECOND, Tensor, header_text, refused, shard_bytes, with_header};

const GATE: &str = "model.layers.2.block_sparse_moe.gate.weight";

fn second_shard() -> Vec<Tensor> {
    Model::mixtral().shards[1].1.clone()
}

/// Writes `bytes` in place of the second shard and expects a refusal that names it.
fn shard_refused(what: &str, bytes: &[u8], parts: &[&str]) {
    let dir = Model::mixtral().written();
    fs::write(dir.path().join(SECOND), bytes).unwrap();
    refused(what, dir.path(), &[&[SECOND], parts].concat());
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let good = shard_bytes(&second_shard());
    let claim = |length: u64| [&length.to_le_bytes(), &good[8..]].concat();
    shard_refused("empty", b"", &["0 bytes long, too short"]);
    shard_refused("7 bytes", &good[..7], &["7 bytes long, too short"]);
    shard_refused("8 bytes", &good[..8], &["header claims", "allowed are 2 to 0"]);
    for length in [0, 1, good.len() as u64 - 7, LONGEST_HEADER + 1, u64::MAX, u64::MAX - 7] {
        shard_refused("claimed length", &claim(length), &[&format!("header claims {length} bytes")]);
    }
    shard_refused("all zero", &vec![0; good.len()], &["header claims 0 bytes"]);
}

#[test]
fn files_that_are_too_short_or_too_long_are_refused() {
    let good = shard_bytes(&second_shard());
    shard_refused("a byte short", &good[..good.len() - 1], &["the file is truncated or damaged"]);
    shard_refused("half", &good[..good.len() / 2], &["the file is truncated or damaged"]);
    shard_refused("a byte more", &[good.as_slice(), &[0]].concat(), &["the file is truncated or damaged"]);
}

#[test]
fn text_that_is_no_header_is_refused() {
    let good = header_text(&second_shard());
    let nested = format!("{{\"x\": {}", "[".repeat(100_000));
    let mut table = vec![
        ("spaces before it", format!(" {good}"), "does not begin with `{`"),
        ("an array", "[1, 2]".to_owned(), "does not begin with `{`"),
        ("half an object", good[..good.len() / 2].to_owned(), "header is not valid"),
        ("something after it", format!("{good} x"), "trailing characters"),
        ("nested deep", nested, "header is not valid"),
        (
            "metadata is a list",
            good.replace(r#"{"format":"pt"}"#, "[]"),
            "`__metadata__` to be an object of strings",
        ),
        ("metadata has a number", good.replace(r#""pt""#, "1"), "expected a string"),
        ("metadata key twice", good.replace(r#""pt""#, r#""pt","format":"pt""#), "key `format` twice"),
        (
            "metadata twice",
            good.replace(r#""pt"},"#, r#""pt"},"__metadata__":{},"#),
            "`__metadata__` comes twice",
        ),
        (
            "metadata too long",
            good.replace(r#""pt""#, &format!("\"{}\"", "x".repeat(LONGEST_METADATA))),
            "is longer than",
        ),
        (
            "tensor twice",
            format!("{{\"{GATE}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}},{}", &good[1..]),
            "comes twice",
        ),
    ];
    table.push(("an empty name", good.replace(GATE, ""), "a name is 1 to 512 bytes"));
    table.push(("a name with a line feed", good.replace(GATE, r"a\nb"), "`a\\nb`: a name is"));
    table.push(("a long name", good.replace(GATE, &"x".repeat(513)), "a name is 1 to 512 bytes"));
    let data: Vec<u8> = second_shard().iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    for (what, header, says) in table {
        shard_refused(what, &with_header(header.as_bytes(), &data), &[says]);
    }
    let mut bytes = good.into_bytes();
    bytes[40] = 0xff;
    shard_refused("not UTF-8", &with_header(&bytes, &data), &["utf-8"]);
}

#[test]
fn entries_that_contradict_themselves_are_refused() {
    let tensors = second_shard();
    let good = header_text(&tensors);
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    let at = tensors.iter().position(|tensor| tensor.name == GATE).unwrap();
    let begin: usize = tensors[..at].iter().map(|tensor| tensor.bytes.len()).sum();
    let end = begin + tensors[at].bytes.len();
    let entry = format!(r#""{GATE}":{{"dtype":"F32","shape":[6,8],"data_offsets":[{begin},{end}]}}"#);
    assert!(good.contains(&entry));
    let with = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{GATE}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let span = format!("[{begin},{end}]");
    let ones = format!("[{}6]", "1,".repeat(999));
    let offsets = |b: usize, e: usize| format!("[{b},{e}]");
    for (what, changed, says) in [
        ("no dtype", format!(r#""{GATE}":{{"shape":[6,8],"data_offsets":{span}}}"#), "missing field `dtype`"),
        ("no shape", format!(r#""{GATE}":{{"dtype":"F32","data_offsets":{span}}}"#), "missing field `shape`"),
        (
            "no offsets",
            format!(r#""{GATE}":{{"dtype":"F32","shape":[6,8]}}"#),
            "missing field `data_offsets`",
        ),
        ("a field too many", entry.replace(r#""dtype""#, r#""x":1,"dtype""#), "unknown field"),
        ("a field twice", entry.replace(r#""dtype""#, r#""dtype":"F32","dtype""#), "duplicate field `dtype`"),
        ("unknown dtype", with("F33", "[6,8]", &span), "dtype F33 is unknown"),
        ("sub-byte dtype", with("F4", "[6,8]", &span), "dtype F4 is unknown or takes no whole bytes"),
        ("rank 0", with("F32", "[]", &span), "do not span the 4 bytes of F32 []"),
        ("rank 1000", with("F32", &ones, &span), "at most 8 dimensions"),
        ("zero dimension", with("F32", "[0,8]", &span), "do not span the 0 bytes of F32 [0, 8]"),
        ("negative dimension", with("F32", "[-6,8]", &span), "invalid value: integer `-6`"),
        ("dimension 6.0", with("F32", "[6.0,8]", &span), "invalid type: floating point"),
        ("dimension 2^64", with("F32", "[18446744073709551616,8]", &span), "invalid type: floating point"),
        ("product overflows", with("F32", "[4294967296,4294967296,4]", &span), "too big"),
        ("shape and span differ", with("F32", "[6,9]", &span), "do not span the 216 bytes of F32 [6, 9]"),
        ("dtype and span differ", with("BF16", "[6,8]", &span), "do not span the 96 bytes of BF16 [6, 8]"),
        ("offsets reversed", with("F32", "[6,8]", &offsets(end, begin)), "do not span"),
        ("offsets of three", with("F32", "[6,8]", &format!("[{begin},{end},0]")), "header is not valid"),
        ("overlap", with("F32", "[6,8]", &offsets(begin - 4, end - 4)), "ends at"),
        ("gap", with("F32", "[6,8]", &offsets(begin + 4, end + 4)), "ends at"),
        ("past the end", with("F32", "[6,8]", "[1000000000,1000000192]"), "ends at"),
        ("misaligned", with("F32", "[6,8]", &offsets(begin + 2, end + 2)), "which 4 does not divide"),
    ] {
        let header = good.replace(&entry, &changed);
        assert_ne!(header, good, "{what} changes something");
        shard_refused(what, &with_header(header.as_bytes(), &data), &[says]);
    }
}

#[test]
fn too_many_tensors_are_refused() {
    let entry = |i: usize| format!(r#""t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1);
    let header = format!("{{{}}}", (0..500_001).map(entry).collect::<Vec<_>>().join(","));
    shard_refused(
        "500 001 tensors",
        &with_header(header.as_bytes(), &vec![0; 500_001]),
        &["more than 500000 tensors"],
    );
}

#[test]
fn padding_after_the_header_is_allowed() {
    let model = Model::mixtral();
    let dir = model.written();
    let tensors = &model.shards[0].1;
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    let padded = format!("{}     ", header_text(tensors));
    fs::write(dir.path().join(FIRST), with_header(padded.as_bytes(), &data)).unwrap();
    crate::model::open(dir.path()).unwrap();
}

/// As `Model::add`, with as many bytes as a single number or no number takes.
fn shaped(name: &str, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    Tensor { name: name.to_owned(), dtype: "F32", shape: shape.to_vec(), bytes: vec![0; 4 * count] }
}

#[test]
fn single_numbers_and_tensors_without_elements_are_legal_where_nothing_needs_them() {
    let mut model = Model::mixtral();
    for (at, (name, shape)) in
        [("a.scale", &[][..]), ("b.empty", &[0]), ("c.empty", &[3, 0, 2]), ("z.empty", &[0, 8])]
            .into_iter()
            .enumerate()
    {
        // In the middle, at the beginning and at the end of the data.
        let tensors = &mut model.shards[1].1;
        let place = [3, 0, 0, tensors.len()][at];
        tensors.insert(place, shaped(name, shape));
    }
    let dir = model.written();
    let checkpoint = crate::model::open(dir.path()).unwrap();
    checkpoint.roles().for_each(|role| drop(checkpoint.read(role).unwrap()));
    let unused = checkpoint.unused();
    assert_eq!(unused.iter().map(|unused| unused.bytes).sum::<u64>(), 4, "{unused:?}");
    for shape in [&[][..], &[0, 8], &[6, 0]] {
        let mut model = Model::mixtral();
        let tensor = model.tensor(GATE);
        *tensor = shaped(GATE, shape);
        let shown = format!("is {shape:?}, config.json says [6, 8]");
        refused("needed", model.written().path(), &[GATE, &shown]);
    }
}

#[test]
fn metadata_may_be_null() {
    let tensors = second_shard();
    let good = header_text(&tensors);
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    let start = good.find("\"__metadata__\":").unwrap();
    let end = start + good[start..].find('}').unwrap() + 1;
    let with_null = format!("{}\"__metadata__\":null{}", &good[..start], &good[end..]);
    let dir = Model::mixtral().written();
    fs::write(dir.path().join(SECOND), with_header(with_null.as_bytes(), &data)).unwrap();
    crate::model::open(dir.path()).unwrap();
    let twice = with_null.replace(":null", ":null,\"__metadata__\":null");
    shard_refused("null twice", &with_header(twice.as_bytes(), &data), &["`__metadata__` comes twice"]);
}
