//! What is read from tokenizer files, and what is refused.

mod common;

use common::{DEMO, LLAMA_DECODER, file, llama, llama_json, mixtral};
use std::cell::Cell;

use muster_text::{Bounds, Chat, GenerationPrompt, Special, SpecialText, TextError, Tokenizer};
use proptest::prelude::*;

fn load(json: &str, config: &str) -> Result<Tokenizer, TextError> {
    common::load(json.as_bytes(), Some(config.as_bytes()), 300)
}

fn refusal(json: &str, config: &str) -> String {
    load(json, config).expect_err("accepted").to_string()
}

#[test]
fn flags_of_the_configuration_override_the_post_processor() {
    let encode = |config: &str| load(&llama_json(), config).unwrap().encode("hi", Special::Add).unwrap();
    let plain = encode("{}");
    let tokens = r#""bos_token": "<s>", "eos_token": {"content": "</s>"}"#;
    let around = |flags: &str| encode(&format!("{{{tokens}{flags}}}"));
    assert_eq!(around(""), plain);
    assert_eq!(around(r#", "add_bos_token": true"#), [&[1], &plain[..]].concat());
    let both = around(r#", "add_bos_token": true, "add_eos_token": true"#);
    assert_eq!(both, [&[1], &plain[..], &[2]].concat());

    let json = file("tests/fixtures/mixtral/tokenizer.json");
    let config = br#"{"bos_token": "<s>", "add_bos_token": false}"#;
    let tokenizer = common::load(&json, Some(config), 320).unwrap();
    let unadorned = mixtral().encode("hi", Special::Omit).unwrap();
    assert_eq!(tokenizer.encode("hi", Special::Add).unwrap(), unadorned);
    // Never twice.
    let config = br#"{"bos_token": "<s>", "add_bos_token": true}"#;
    let tokenizer = common::load(&json, Some(config), 320).unwrap();
    assert_eq!(tokenizer.encode("hi", Special::Add).unwrap(), [&[1], &unadorned[..]].concat());
}

#[test]
fn a_token_to_add_that_does_not_exist_is_refused() {
    let error = refusal(&llama_json(), r#"{"bos_token": "<begin>", "add_bos_token": true}"#);
    assert!(error.contains("add_bos_token") && error.contains("<begin>"), "{error}");
    let error = refusal(&llama_json(), r#"{"add_eos_token": true}"#);
    assert!(error.contains("add_eos_token"), "{error}");
}

#[test]
fn a_normalizer_that_multiplies_a_text_is_refused() {
    let with = |times: usize| {
        let mut json: serde_json::Value = serde_json::from_str(&llama_json()).unwrap();
        let step = serde_json::json!({"type": "Replace", "pattern": {"String": "h"}, "content": "hh"});
        json["normalizer"] = serde_json::json!({"type": "Sequence", "normalizers": vec![step; times]});
        load(&json.to_string(), "{}")
    };
    assert!(with(3).is_ok());
    let error = with(40).expect_err("accepted").to_string();
    assert!(error.contains("its normalizer can make a text 1099511627776 times as long"), "{error}");
}

#[test]
fn truncation_left_over_from_training_is_off() {
    assert_eq!(llama().encode("h h h h", Special::Add).unwrap().len(), 4);
}

#[test]
fn a_token_beyond_the_models_vocabulary_is_refused_in_texts_that_need_it() {
    let tokenizer = common::load(llama_json().as_bytes(), None, 266).unwrap();
    assert_eq!(tokenizer.tokens_beyond(), 1);
    assert_eq!(tokenizer.encode("é", Special::Omit).unwrap().last(), Some(&265));
    let error = tokenizer.encode("h é世", Special::Omit).unwrap_err();
    assert_eq!(error, TextError::TokenBeyondVocab { token: "世".into(), id: 266, vocab: 266 });
    assert!(error.to_string().contains("266"), "{error}");
    assert!(tokenizer.decode(&[266], SpecialText::Keep).is_err());
    let whole = common::load(llama_json().as_bytes(), None, 267).unwrap();
    assert_eq!(whole.tokens_beyond(), 0);
    assert_eq!(whole.encode("世", Special::Omit).unwrap().last(), Some(&266));
    assert!(common::load(llama_json().as_bytes(), None, u32::MAX).is_err());
}

#[test]
fn a_token_around_every_text_has_an_embedding() {
    let config = r#"{"bos_token": "<begin>", "add_bos_token": true, "added_tokens_decoder": {"267": {"content": "<begin>"}}}"#;
    let ids = |vocab| {
        let tokenizer = common::load(llama_json().as_bytes(), Some(config.as_bytes()), vocab)?;
        tokenizer.encode("h", Special::Add)
    };
    assert_eq!(ids(268).unwrap()[0], 267);
    assert!(matches!(ids(267), Err(TextError::TokenBeyondVocab { id: 267, .. })));
}

#[test]
fn tokens_that_are_told_apart_by_chance_are_refused() {
    let mut json: serde_json::Value = serde_json::from_str(&llama_json()).unwrap();
    json["normalizer"] = serde_json::json!({"type": "Lowercase"});
    let config = r#"{"added_tokens_decoder": {"1000": {"content": "HI"}, "1001": {"content": "Hi"}}}"#;
    let error = refusal(&json.to_string(), config);
    assert!(error.contains("\"HI\" and \"Hi\"") && error.contains("normalized"), "{error}");
}

#[test]
fn special_tokens_are_listed_with_where_they_come_from() {
    let config = r#"{"bos_token": "<s>", "pad_token": "</s>", "eos_token": "</s>", "image_token": "<image>", "added_tokens_decoder":
        {"2": {"content": "</s>", "special": true, "lstrip": true}, "900": {"content": "<x>", "special": true}, "901": {"content": "day"}}}"#;
    let tokenizer = load(&llama_json(), config).unwrap();
    let listed: Vec<(u32, &str, String, &str)> = tokenizer
        .special_tokens()
        .iter()
        .map(|token| (token.id, token.text.as_str(), token.names.join(" "), token.source.as_str()))
        .collect();
    let expected = [
        (0, "<unk>", "", "tokenizer.json"),
        (1, "<s>", "bos_token", "tokenizer.json"),
        (
            2,
            "</s>",
            "eos_token pad_token",
            "tokenizer.json, then tokenizer_config.json: added_tokens_decoder[2]",
        ),
        (267, "<x>", "", "tokenizer_config.json: added_tokens_decoder[900]"),
        (269, "<image>", "image_token", "tokenizer_config.json: image_token"),
    ];
    assert_eq!(listed, expected.map(|(id, text, names, source)| (id, text, names.to_owned(), source)));
}

#[test]
fn decoders_of_other_families_are_refused_by_name() {
    let with = |decoder: &str| {
        let plain = serde_json::to_string(&serde_json::from_str::<serde_json::Value>(LLAMA_DECODER).unwrap());
        let json = llama_json();
        assert!(json.contains(plain.as_ref().unwrap()));
        refusal(&json.replace(&plain.unwrap(), decoder), "{}")
    };
    assert!(with(r#"{"type": "WordPiece", "prefix": "x", "cleanup": true}"#).contains("WordPiece"));
    assert!(with("null").contains("`decoder` is missing"));
    let strip = r#"{"type": "Sequence", "decoders": [{"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}"#;
    assert!(with(strip).contains("Strip"));
}

#[test]
fn malformed_files_are_refused_with_their_names() {
    let deep = "[".repeat(100_000);
    for json in ["", "{}", "null", "[]", "{\"version\": \"1.0\"}", &deep, &llama_json()[..2000]] {
        let error = refusal(json, "{}");
        assert!(error.starts_with("tokenizer.json: "), "{error}");
    }
    assert!(refusal(&llama_json(), "[").starts_with("tokenizer_config.json: "));
    let huge = vec![b' '; (64 << 20) + 1];
    assert!(matches!(common::load(&huge, None, 300), Err(TextError::FileTooLarge { .. })));
}

#[test]
fn a_text_beyond_the_cap_is_refused() {
    let error = mixtral().encode(&" ".repeat((16 << 20) + 1), Special::Add).unwrap_err();
    assert!(matches!(error, TextError::TextTooLong { .. }));
}

#[test]
fn long_runs_of_one_character_are_not_quadratic() {
    let tokenizer = common::demo();
    for c in ["a", " ", "\n", "é", "0", "(", "世"] {
        let text = c.repeat((1 << 20) / c.len());
        let ids = tokenizer.encode(&text, Special::Omit).unwrap();
        assert_eq!(tokenizer.decode(&ids, SpecialText::Keep).unwrap(), text);
    }
}

#[test]
fn a_bad_template_leaves_the_tokenizer_usable() {
    let tokenizer = load(&llama_json(), r#"{"chat_template": "{% if %}"}"#).unwrap();
    assert!(tokenizer.encode("hi", Special::Add).is_ok());
    assert!(matches!(tokenizer.chat_template(), Err(TextError::TemplateFailed { .. })));
    assert_eq!(llama().chat_template().unwrap_err(), TextError::NoChatTemplate);
}

#[test]
fn a_template_is_tried_with_every_role() {
    let outcomes = |config: &str, vocab| {
        let tokenizer = common::load(llama_json().as_bytes(), Some(config.as_bytes()), vocab).unwrap();
        let trials = tokenizer.try_roles().into_iter();
        trials.map(|trial| (trial.role, trial.outcome.map_err(|e| e.to_string()))).collect::<Vec<_>>()
    };
    let template = |source: &str| format!("{{\"chat_template\": {}}}", serde_json::json!(source));
    let strict = template(
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}\
         {{ m.content }}{% endfor %}",
    );
    let no = |what: &str| Err(what.to_owned());
    let outcome = outcomes(&strict, 300);
    assert_eq!(outcome[..3], [("user", Ok(())), ("system", no("no system")), ("assistant", Ok(()))]);
    assert!(outcome[3].0 == "tool" && outcome[3].1.is_err(), "{outcome:?}");
    // No file names a token for the beginning.
    let nameless = template("{{ bos_token + messages[0].content }}");
    assert!(outcomes(&nameless, 300).iter().all(|(_, outcome)| outcome.is_err()));
    let beyond = template("世{{ messages[0].content }}");
    let (_, outcome) = &outcomes(&beyond, 266)[0];
    assert!(outcome.as_ref().unwrap_err().contains("266"), "{outcome:?}");
    assert!(outcomes("{}", 300).is_empty());
}

#[test]
fn a_separate_template_replaces_the_configurations() {
    let config = r#"{"bos_token": "<s>", "chat_template": "old"}"#;
    let tokenizer =
        load(&llama_json(), config).unwrap().with_chat_templates(Some(b"{{ bos_token }}new\n"), None);
    let rendered =
        tokenizer.chat_template().unwrap().render(&Chat::default(), GenerationPrompt::Omit, None).unwrap();
    assert_eq!(rendered, "<s>new");
    let broken = tokenizer.with_chat_templates(Some(b"\xff"), None);
    assert!(broken.chat_template().unwrap_err().to_string().starts_with("chat_template.jinja: "));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Damaged files are refused or read; text for what was read is encoded or refused. Nothing panics.
    #[test]
    fn damaged_files_do_not_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        demo in any::<bool>(),
    ) {
        let mut json = if demo { file(&format!("{DEMO}/tokenizer.json")) } else { llama_json().into_bytes() };
        // The interesting parts are around the vocabulary, not in it.
        let head = json.len().min(3000);
        for (at, byte) in damage {
            json[at.index(head)] = byte;
        }
        if let Some(cut) = cut {
            let start = cut.index(head);
            json.drain(start..start + 1);
        }
        if let Ok(tokenizer) = common::load(&json, None, 4096)
            && let Ok(ids) = tokenizer.encode("<s> hi 世 <|user|>", Special::Add)
        {
            prop_assert!(tokenizer.decode(&ids, SpecialText::Drop).is_ok());
        }
    }
}

#[test]
fn conversations_with_tools_take_the_template_for_tools() {
    let named = r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "{%"},
        {"name": "tool_use", "template": "t{{ tools|length }}"}]}"#;
    let tools = vec![serde_json::json!({"type": "function"})];
    let text = |tokenizer: &Tokenizer, tools: &[serde_json::Value]| {
        let chat = Chat { tools: tools.to_vec(), ..Chat::default() };
        tokenizer.chat_template().unwrap().render(&chat, GenerationPrompt::Omit, None)
    };
    let tokenizer = load(&llama_json(), named).unwrap();
    assert_eq!(text(&tokenizer, &[]).unwrap(), "d");
    assert_eq!(text(&tokenizer, &tools).unwrap(), "t1");
    // Files of their own replace all that the configuration has.
    let files = tokenizer.clone().with_chat_templates(Some(b"file {{ tools is none }}"), None);
    assert_eq!(text(&files, &[]).unwrap(), "file True");
    assert_eq!(text(&files, &tools).unwrap(), "file False");
    let files = tokenizer.clone().with_chat_templates(Some(b"file"), Some(b"tool file {{ tools|length }}"));
    assert_eq!(text(&files, &[]).unwrap(), "file");
    assert_eq!(text(&files, &tools).unwrap(), "tool file 1");
    assert_eq!(text(&tokenizer.clone().with_chat_templates(None, None), &[]).unwrap(), "d");
    let only = tokenizer.with_chat_templates(None, Some(b"{{ tools }}"));
    assert!(text(&only, &[]).unwrap_err().to_string().contains("with tools only"));
    let broken = only.with_chat_templates(None, Some(b"\xff"));
    let error = broken.chat_template().unwrap_err().to_string();
    assert!(error.starts_with("additional_chat_templates/tool_use.jinja: "), "{error}");
}

#[test]
fn special_tokens_of_every_form_reach_the_template() {
    let config = r#"{"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": false, "special": true},
        "eos_token": "</s>", "cls_token": "<s>", "sep_token": {"content": "</s>"}, "mask_token": null,
        "added_tokens_decoder": {"1": {"content": "<s>", "special": true}}, "additional_special_tokens": ["<s>"],
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ cls_token }}{{ sep_token }}{{ mask_token is defined }}"}"#;
    let tokenizer = load(&llama_json(), config).unwrap();
    let template = tokenizer.chat_template().unwrap();
    assert_eq!(
        template.render(&Chat::default(), GenerationPrompt::Omit, None).unwrap(),
        "<s></s><s></s>False"
    );
}

#[test]
fn a_text_with_too_many_tokens_is_refused_before_it_is_tokenized() {
    let within = |text: &str, tokens| {
        let bounds = Bounds { tokens, stretch: 64 << 10 };
        common::demo().encode_within(text, Special::Add, bounds, || panic!("it was tokenized"))
    };
    for text in ["a".repeat(4 << 20), "one two three ".repeat(300_000), "世".repeat(1 << 20)] {
        let error = within(&text, 512).unwrap_err();
        assert!(matches!(error, TextError::TooManyTokens { least, most: 512 } if least > 10_000), "{error}");
    }
}

#[test]
fn a_text_is_tokenized_no_further_than_wanted() {
    let text = "It was a big smile, she said. ".repeat(20_000);
    let tokenizer = common::demo();
    let bounds = Bounds { tokens: usize::MAX, stretch: 64 << 10 };
    let whole = tokenizer.encode(&text, Special::Add).unwrap();
    assert_eq!(tokenizer.encode_within(&text, Special::Add, bounds, || true).unwrap(), whole);
    let asked = Cell::new(0);
    let stop_at = |last| {
        let wanted = || asked.replace(asked.get() + 1) < last;
        tokenizer.encode_within(&text, Special::Add, bounds, wanted)
    };
    assert_eq!(stop_at(3), Err(TextError::Unwanted));
    assert_eq!(asked.get(), 4);
    // Too many only once they are counted.
    let parts = Cell::new(0);
    let bounds = Bounds { tokens: whole.len() - 1, ..bounds };
    let error =
        tokenizer.encode_within(&text, Special::Add, bounds, || parts.replace(parts.get() + 1) < 1000);
    assert!(matches!(error, Err(TextError::TooManyTokens { .. })), "{error:?}");
    let bounds = Bounds { tokens: whole.len(), ..bounds };
    assert_eq!(tokenizer.encode_within(&text, Special::Add, bounds, || true).unwrap(), whole);
}

#[test]
fn what_holds_together_for_too_long_is_refused() {
    let bounds = Bounds { tokens: usize::MAX, stretch: 64 << 10 };
    let error =
        common::demo().encode_within(&"a".repeat(100_000), Special::Omit, bounds, || true).unwrap_err();
    assert_eq!(error, TextError::StretchTooLong { bytes: 100_000, limit: 64 << 10 });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However long its tokens: no text has fewer than are said.
    #[test]
    fn no_text_has_fewer_tokens_than_are_said(
        words in prop::collection::vec(prop::sample::select(vec![
            " ", "        ", "▁▁", "a", "hi", " hi", "smile", "there", "Once upon a time", "\n\n", "é", "世", "<s>", "<|user|>", "....",
        ]), 0..60),
    ) {
        let text = words.concat();
        thread_local! {
            static ALL: [Tokenizer; 3] = [common::demo(), mixtral(), llama()];
        }
        ALL.with(|all| {
            for tokenizer in all {
                let ids = tokenizer.encode(&text, Special::Omit).unwrap();
                prop_assert!(tokenizer.least_tokens(&text) <= ids.len(), "{}", text);
            }
            Ok(())
        })?;
    }
}
