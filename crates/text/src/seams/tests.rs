//! Parts against the whole, for the tokenizers of the tests and for those of published models' kinds.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::TokenizerFiles;
use crate::library::Library;

const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const POSSESSIVE: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn byte_level(splits: &[Value]) -> Value {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let steps = [splits, &[bytes]].concat();
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn demo() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn mixtral() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mixtral/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The demo's vocabulary behind another pre-tokenizer and normalizer.
fn with(splitter: Value, normalizer: Value) -> Value {
    let mut json = demo();
    json["pre_tokenizer"] = splitter;
    json["normalizer"] = normalizer;
    json
}

/// Words that are not split, merged from characters and bytes.
fn sentence_piece(steps: &[Value], splitter: &Value) -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(['▁'].into_iter().chain('!'..='~').map(String::from));
    let merges = [
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "a"),
        ("a", "n"),
        ("▁a", "n"),
        ("e", "r"),
        (",", "▁"),
        ("(", ")"),
        ("▁", "("),
        ("1", "2"),
        ("0", "0"),
    ];
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let merges = merges.map(|(left, right)| format!("{left} {right}"));
    let vocab: serde_json::Map<String, Value> = tokens.iter().cloned().zip((0..).map(Value::from)).collect();
    let special: Vec<Value> = (0..3).map(|id| added(id, &tokens[id as usize])).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": splitter, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": merges}
    })
}

fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true})
}

fn replace() -> Value {
    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
}

fn prepend() -> Value {
    json!({"type": "Prepend", "prepend": "▁"})
}

fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
}

/// Those of published kinds, by name.
fn tokenizers() -> Vec<(&'static str, Value)> {
    let nfc = json!({"type": "NFC"});
    let mut odd = demo();
    let tokens = odd["added_tokens"].as_array_mut().unwrap();
    for (id, content, flag) in [
        (4000, "er ", "lstrip"),
        (4001, "the", "rstrip"),
        (4002, " a", "single_word"),
        (4003, "x, y", "normalized"),
    ] {
        let mut token = added(id, content);
        token[flag] = true.into();
        tokens.push(token);
    }
    let vocab = odd["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < 4000);
    let merges = odd["model"]["merges"].as_array_mut().unwrap();
    merges.clear();
    vec![
        ("demo", demo()),
        ("mixtral", mixtral()),
        ("odd added tokens", odd),
        (
            "gpt-2",
            with(
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
                Value::Null,
            ),
        ),
        ("cl100k", with(byte_level(&[split(CL100K)]), Value::Null)),
        ("qwen", with(byte_level(&[split(CL100K)]), nfc.clone())),
        ("o200k", with(byte_level(&[split(O200K)]), Value::Null)),
        ("deepseek", with(byte_level(&DEEPSEEK.map(split)), json!({"type": "Sequence", "normalizers": []}))),
        (
            "nfkc",
            with(
                byte_level(&[json!({"type": "Digits", "individual_digits": true}), split(CL100K)]),
                json!({"type": "NFKC"}),
            ),
        ),
        ("llama", sentence_piece(&[prepend(), replace()], &Value::Null)),
        ("gemma", sentence_piece(&[replace()], &Value::Null)),
        ("metaspace", sentence_piece(&[], &metaspace("always", true))),
        ("metaspace, first", sentence_piece(&[], &metaspace("first", true))),
        ("metaspace, unsplit", sentence_piece(&[], &metaspace("first", false))),
    ]
}

fn library(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn ids(library: &Tokenizer, text: &str) -> Vec<u32> {
    library.encode_fast(text, false).unwrap().get_ids().to_vec()
}

/// Those with tokens from the files beside `tokenizer.json`, by name.
fn with_files_beside() -> Vec<(String, Tokenizer)> {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/beside");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("{fixtures}/cases")).unwrap() {
        let case = entry.unwrap().path();
        let read = |name: &str| std::fs::read(case.join(name)).ok();
        let expected: Value = serde_json::from_slice(&read("expected.json").unwrap()).unwrap();
        let base = || std::fs::read(format!("{fixtures}/bases/{}.json", expected["base"].as_str().unwrap()));
        let json = read("tokenizer.json").unwrap_or_else(|| base().unwrap());
        let (config, map, added) =
            (read("tokenizer_config.json"), read("special_tokens_map.json"), read("added_tokens.json"));
        let files = TokenizerFiles {
            config: config.as_deref(),
            special_tokens_map: map.as_deref(),
            added_tokens: added.as_deref(),
            ..TokenizerFiles::alone(&json)
        };
        if let Ok((library, _)) = Library::read(&files) {
            let name = case.file_name().unwrap().to_str().unwrap().to_owned();
            all.push((name, library.get().clone()));
        }
    }
    assert!(all.len() > 70, "{}", all.len());
    all
}

/// The ids of all parts, and how many there are.
fn in_parts(library: &Tokenizer, seams: &Seams, text: &str, target: usize) -> (Vec<u32>, usize) {
    let (mut all, mut rest, mut parts) = (Vec::new(), text, 0);
    while !rest.is_empty() {
        let part = seams.first(rest, target);
        all.extend(ids(library, part.text));
        rest = part.rest;
        parts += 1;
    }
    (all, parts)
}

const TEXT: &str = "The weather, it's said, was \"fine\" (12,345 m)…\nThen they'd gone.  Naïve слово слово, 漢字漢字。かな、한국어 text\n\n\
    if (a<b) { return x_1[2]; }\tthe end: the and the an 00120012\r\n  a   the\n the <s> the</s> an ";

#[test]
fn every_published_kind_has_seams_and_they_hold() {
    for (name, json) in tokenizers() {
        let library = library(&json);
        let seams = Seams::of(&library);
        let whole = ids(&library, TEXT);
        for target in 1..60 {
            let (parts, count) = in_parts(&library, &seams, TEXT, target);
            assert_eq!(parts, whole, "{name}, parts of {target}");
            let least = if name == "odd added tokens" { 5 } else { 12 };
            assert!(target > 8 || count >= least, "{name}: {count} parts of {target}");
        }
    }
}

#[test]
fn tokens_from_other_files_have_seams_and_they_hold() {
    let mut in_parts_at_all = 0;
    let text = format!("{TEXT}day <x>\n  <x> \n (b) every day,<x>\n\n a day {TEXT}");
    for (name, library) in with_files_beside() {
        let seams = Seams::of(&library);
        let whole = ids(&library, &text);
        for target in 1..60 {
            let (parts, count) = in_parts(&library, &seams, &text, target);
            assert_eq!(parts, whole, "{name}, parts of {target}");
            in_parts_at_all += usize::from(count > 1);
        }
    }
    assert!(in_parts_at_all > 3000, "{in_parts_at_all}");
}

#[test]
fn what_cannot_be_shown_has_no_seams() {
    let of = |json: Value| Seams::of(&library(&json)).first(TEXT, 8).rest.is_empty();
    assert!(of(with(byte_level(&[split(POSSESSIVE)]), Value::Null)), "an anchor");
    assert!(of(with(byte_level(&[split(r"\p{N}{1,3}")]), Value::Null)), "nothing splits words");
    assert!(of(with(byte_level(&[split(CL100K)]), json!({"type": "Lowercase"}))), "another normalizer");
    let mut dropout = demo();
    dropout["model"]["dropout"] = json!(0.1);
    assert!(of(dropout), "chance");
    let mut unknown = sentence_piece(&[replace()], &Value::Null);
    unknown["model"]["byte_fallback"] = json!(false);
    assert!(of(unknown), "characters that are not known are fused");
}

#[test]
fn a_stretch_without_a_seam_stays_whole() {
    let seams = Seams::of(&library(&demo()));
    let text = format!("{} b", "a".repeat(1000));
    let part = seams.first(&text, 10);
    assert_eq!((part.text.len(), part.rest), (1000, " b"));
}

fn any_text() -> impl Strategy<Value = String> {
    let bit = prop_oneof![
        8 => prop::sample::select(vec![
            "a", "the", "er", "s", "'s", "'", "x", "y", "Z", "0", "12", ".", ",", ", ", "(", ")", "_", "-", "/", "!", "\"", "<", ">",
            " ", "  ", "\n", "\r\n", "\t", "\u{a0}", "\u{3000}", "▁", "é", "e\u{301}", "\u{301}", "ж", "漢", "か", "か\u{3099}", "한",
            "\u{1112}\u{1161}", "。", "，", "、", "！", "\u{212a}", "\u{37e}", "Å", "🦀", "\u{200b}", "\u{85}", "\u{a8}", "<s>", "</s>",
            "<|user|>", "<0x41>", "the ", " the", "x, y", "er ", "<x>", "day", "\n ", " \n", "<|im_end|>", "<begin>", "ing", "é day",
        ]).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(bit, 0..40).prop_map(|bits| bits.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn parts_have_the_ids_of_the_whole(text in any_text(), target in 1_usize..24) {
        thread_local! {
            static ALL: Vec<(String, Tokenizer, Seams)> = tokenizers()
                .into_iter()
                .map(|(name, json)| (name.to_owned(), library(&json)))
                .chain(with_files_beside())
                .map(|(name, library)| { let seams = Seams::of(&library); (name, library, seams) })
                .collect();
        }
        ALL.with(|all| {
            for (name, library, seams) in all {
                let (parts, _) = in_parts(library, seams, &text, target);
                prop_assert_eq!(parts, ids(library, &text), "{}: {:?}", name, text);
            }
            Ok(())
        })?;
    }
}
