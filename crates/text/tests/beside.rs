//! Tokenizers whose tokens stand beside `tokenizer.json` are the reference's: ids, text, names and chats; what is not
//! taken is refused by name.
//!
//! `fixtures/beside` has the directories and what transformers made of them; its README says how to make more.

#![allow(clippy::unwrap_used, reason = "all of it is test code")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{ids, read_message};
use muster_text::{
    ChatMessage, GenerationPrompt, Special, SpecialText, TextError, Tokenizer, TokenizerFiles,
};
use serde_json::Value;

/// One directory.
struct Case {
    name: String,
    files: BTreeMap<&'static str, Vec<u8>>,
    expected: Value,
}

const FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

impl Case {
    fn read(path: &Path, bases: &Path) -> Self {
        let expected: Value =
            serde_json::from_slice(&std::fs::read(path.join("expected.json")).unwrap()).unwrap();
        let mut files: BTreeMap<_, _> =
            FILES.into_iter().filter_map(|file| Some((file, std::fs::read(path.join(file)).ok()?))).collect();
        let base =
            || std::fs::read(bases.join(format!("{}.json", expected["base"].as_str().unwrap()))).unwrap();
        files.entry("tokenizer.json").or_insert_with(base);
        Self { name: path.file_name().unwrap().to_str().unwrap().to_owned(), files, expected }
    }

    fn vocab(&self) -> u32 {
        u32::try_from(self.expected["vocab"].as_u64().unwrap()).unwrap()
    }

    fn tokenizer(&self) -> Result<Tokenizer, TextError> {
        let file = |name| self.files.get(name).map(Vec::as_slice);
        let files = TokenizerFiles {
            tokenizer: &self.files["tokenizer.json"],
            config: file("tokenizer_config.json"),
            special_tokens_map: file("special_tokens_map.json"),
            added_tokens: file("added_tokens.json"),
        };
        Ok(Tokenizer::from_files(&files, self.vocab())?
            .with_chat_templates(file("chat_template.jinja"), None))
    }

    fn list(&self, key: &str) -> &Vec<Value> {
        self.expected[key].as_array().unwrap()
    }
}

fn cases() -> Vec<Case> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/beside");
    let entries = std::fs::read_dir(fixtures.join("cases")).unwrap();
    let mut cases: Vec<Case> =
        entries.map(|entry| Case::read(&entry.unwrap().path(), &fixtures.join("bases"))).collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(cases.len() >= 100, "{}", cases.len());
    cases
}

/// Those that the reference and we take.
fn taken() -> Vec<(Case, Tokenizer)> {
    let is_taken = |case: &Case| case.expected.get("texts").is_some();
    let read = |case: Case| match case.tokenizer() {
        Ok(tokenizer) => (case, tokenizer),
        Err(error) => panic!("{}: {error}", case.name),
    };
    cases().into_iter().filter(is_taken).map(read).collect()
}

fn differences(of: impl Fn(&Case, &Tokenizer) -> Vec<String>) {
    let all: Vec<String> = taken()
        .iter()
        .flat_map(|(case, tokenizer)| {
            of(case, tokenizer).into_iter().map(move |line| format!("{}: {line}", case.name))
        })
        .collect();
    assert!(all.is_empty(), "{}:\n{}", all.len(), all.join("\n"));
}

/// Ids, or the error that ids beyond the vocabulary must give.
fn compare(case: &Case, what: &str, ours: &Result<Vec<u32>, TextError>, theirs: &Value) -> Option<String> {
    let theirs = ids(theirs);
    let is_right = match (ours, theirs.iter().find(|id| **id >= case.vocab())) {
        (Ok(ours), None) => *ours == theirs,
        (Err(TextError::TokenBeyondVocab { id, .. }), Some(_)) => theirs.contains(id),
        _ => false,
    };
    (!is_right).then(|| format!("{what}\n  reference {theirs:?}\n       ours {ours:?}"))
}

#[test]
fn ids_are_those_of_the_reference() {
    differences(|case, tokenizer| {
        let texts = case.list("texts").iter().flat_map(|text| {
            let encode = |special| tokenizer.encode(text["text"].as_str().unwrap(), special);
            let what = text["text"].to_string();
            [
                compare(case, &what, &encode(Special::Add), &text["ids"]),
                compare(case, &what, &encode(Special::Omit), &text["plain"]),
            ]
        });
        texts.flatten().collect()
    });
}

#[test]
fn no_text_is_said_to_have_more_tokens_than_it_has() {
    differences(|case, tokenizer| {
        let texts = case.list("texts").iter().filter_map(|text| {
            let least = tokenizer.least_tokens(text["text"].as_str().unwrap());
            (least > ids(&text["plain"]).len()).then(|| format!("{least} in {text}"))
        });
        texts.collect()
    });
}

#[test]
fn added_tokens_have_the_ids_of_the_reference() {
    differences(|case, tokenizer| {
        let added = case.expected["added"].as_object().unwrap();
        let wrong = tokenizer
            .special_tokens()
            .iter()
            .filter(|token| added.get(&token.text) != Some(&token.id.into()));
        wrong.map(|token| format!("{token:?}")).collect()
    });
}

#[test]
fn text_of_ids_is_that_of_the_reference_whole_and_in_pieces() {
    differences(|case, tokenizer| {
        let texts = case.list("decoded").iter().flat_map(|decoded| {
            let all = ids(&decoded["ids"]);
            if all.iter().any(|id| *id >= case.vocab()) {
                return vec![];
            }
            let mut detokenizer = tokenizer.detokenizer(&[]);
            let mut streamed: String = all.iter().map(|id| detokenizer.push(*id)).collect();
            streamed += &detokenizer.finish();
            let (kept, dropped) =
                (tokenizer.decode(&all, SpecialText::Keep), tokenizer.decode(&all, SpecialText::Drop));
            let ours = [("kept", kept.unwrap()), ("dropped", dropped.unwrap()), ("dropped", streamed)];
            let wrong = ours.into_iter().filter(|(which, text)| decoded[which] != text.as_str());
            wrong.map(|(which, text)| format!("{which} of {decoded}: {text:?}")).collect()
        });
        texts.collect()
    });
}

#[test]
fn templates_see_the_names_that_the_reference_gives_them() {
    differences(|case, tokenizer| {
        let ours: Vec<(&str, &str)> = tokenizer.named_tokens().iter().collect();
        let theirs = case.expected["variables"].as_object().unwrap();
        let theirs: Vec<(&str, &str)> =
            theirs.iter().map(|(name, token)| (name.as_str(), token.as_str().unwrap())).collect();
        let difference = format!("reference {theirs:?}, ours {ours:?}");
        (ours != theirs).then_some(difference).into_iter().collect()
    });
}

#[test]
fn chats_are_those_of_the_reference() {
    differences(|case, tokenizer| {
        let chats = case.list("chats").iter().filter_map(|chat| {
            let messages: Vec<ChatMessage> =
                chat["messages"].as_array().unwrap().iter().map(read_message).collect();
            let ours = tokenizer
                .chat_template()
                .and_then(|template| template.render(&messages.into(), GenerationPrompt::Add, None));
            match (ours, chat["text"].as_str()) {
                (Err(_), None) => None,
                (Ok(ours), Some(theirs)) if ours == theirs => {
                    compare(case, theirs, &tokenizer.encode_chat(&ours), &chat["ids"])
                }
                (ours, theirs) => Some(format!("reference {theirs:?}, ours {ours:?}")),
            }
        });
        chats.collect()
    });
}

#[test]
fn what_is_not_taken_is_refused_by_name() {
    let mut refused = 0;
    for case in cases() {
        let mut words: Vec<&str> = case.expected["ours"].as_str().into_iter().collect();
        words.extend(
            case.expected["names"].as_array().into_iter().flatten().map(|word| word.as_str().unwrap()),
        );
        if words.is_empty() {
            continue;
        }
        refused += 1;
        let error = case.tokenizer().expect_err(&case.name).to_string();
        for word in words {
            assert!(error.contains(word), "{}: {word:?} is not in {error:?}", case.name);
        }
    }
    assert!(refused > 20, "{refused}");
}
