//! Text from ids, one at a time and all at once.

mod common;

use common::{demo, library, llama, llama_json, mixtral};
use muster_text::{Special, SpecialText, Tokenizer};
use proptest::prelude::*;

fn pieces(tokenizer: &Tokenizer, tail: &[u32], ids: &[u32]) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer(tail);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

/// Ids of a vocabulary, with enough bytes among them to break and to build characters.
fn some_ids(vocab: u32) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..vocab, 0..270_u32], 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn byte_level_pieces_are_the_librarys_decoding(ids in some_ids(320)) {
        let tokenizer = mixtral();
        let whole = tokenizer.decode(&ids, SpecialText::Drop).unwrap();
        prop_assert_eq!(&pieces(&tokenizer, &[], &ids).concat(), &whole);
        let library = library(&common::file("tests/fixtures/mixtral/tokenizer.json"));
        prop_assert_eq!(&library.decode(&ids, true).unwrap(), &whole);
        prop_assert_eq!(library.decode(&ids, false).unwrap(), tokenizer.decode(&ids, SpecialText::Keep).unwrap());
    }

    #[test]
    fn sentence_piece_pieces_are_the_librarys_decoding_of_valid_text(ids in some_ids(300)) {
        let tokenizer = llama();
        let whole = tokenizer.decode(&ids, SpecialText::Drop).unwrap();
        prop_assert_eq!(&pieces(&tokenizer, &[], &ids).concat(), &whole);
        if !whole.contains('\u{FFFD}') {
            prop_assert_eq!(library(llama_json().as_bytes()).decode(&ids, true).unwrap(), whole);
        }
    }

    #[test]
    fn a_tail_and_its_continuation_are_the_whole(ids in some_ids(320), at in 0_usize..40) {
        let tokenizer = mixtral();
        let (before, after) = ids.split_at(at.min(ids.len()));
        let mut detokenizer = tokenizer.detokenizer(&[]);
        let mut text: String = before.iter().map(|id| detokenizer.push(*id)).collect();
        let tail = &before[before.len().saturating_sub(64)..];
        text += &pieces(&tokenizer, tail, after).concat();
        prop_assert_eq!(text, tokenizer.decode(&ids, SpecialText::Drop).unwrap());
    }

    #[test]
    fn any_text_comes_back(text in any::<String>()) {
        for tokenizer in [mixtral(), llama()] {
            let ids = tokenizer.encode(&text, Special::Omit).unwrap();
            // A space the text begins with is the one the tokenizer puts there, and it stays.
            prop_assert_eq!(&pieces(&tokenizer, &[], &ids).concat(), &text);
        }
    }
}

#[test]
fn a_character_is_held_until_it_is_whole() {
    let tokenizer = mixtral();
    let ids = tokenizer.encode("😀!", Special::Omit).unwrap();
    let pieces = pieces(&tokenizer, &[], &ids);
    assert_eq!(pieces.concat(), "😀!");
    assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')) && pieces[0].is_empty(), "{pieces:?}");
    let cut = &ids[..ids.len() - 2];
    assert_eq!(tokenizer.decode(cut, SpecialText::Drop).unwrap(), "\u{FFFD}");
}

#[test]
fn byte_tokens_come_out_as_soon_as_a_character_is_whole() {
    let tokenizer = llama();
    let byte = |b: u8| u32::from(b) + 3;
    let ids: Vec<u32> = "🦊🦊".bytes().map(byte).chain([byte(0xFF)]).collect();
    let expected = ["", "", "", "🦊", "", "", "", "🦊", "\u{FFFD}", ""];
    assert_eq!(pieces(&tokenizer, &[], &ids), expected);
}

#[test]
fn only_a_text_of_its_own_loses_its_first_space() {
    let tokenizer = llama();
    let hi = tokenizer.encode("hi", Special::Omit).unwrap();
    assert_eq!(pieces(&tokenizer, &[], &hi).concat(), "hi");
    assert_eq!(pieces(&tokenizer, &hi, &hi).concat(), " hi");
    let special_first = [&[1_u32], &hi[..]].concat();
    assert_eq!(tokenizer.decode(&special_first, SpecialText::Drop).unwrap(), "hi");
}

#[test]
fn unknown_ids_leave_no_text_and_ids_beyond_the_vocabulary_are_named() {
    let tokenizer = llama();
    assert_eq!(tokenizer.decode(&[299, 269, 299], SpecialText::Keep).unwrap(), tokenizer.token_text(269));
    let error = tokenizer.decode(&[1, 300], SpecialText::Keep).unwrap_err().to_string();
    assert_eq!(error, "token id 300 is not below the vocabulary size 300");
    assert_eq!(tokenizer.detokenizer(&[]).push(u32::MAX), "");
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
}

#[test]
fn a_tokens_bytes_are_exact_where_its_text_cannot_be() {
    let tokenizer = llama();
    assert_eq!(tokenizer.token_bytes(0xE5 + 3), [0xE5]);
    assert_eq!(tokenizer.token_text(0xE5 + 3), "\u{FFFD}");
    assert_eq!(tokenizer.token_text(2), "</s>");
}

#[test]
fn work_per_id_does_not_grow_with_broken_text() {
    let tokenizer = demo();
    let lone = (0..4096).find(|id| tokenizer.token_bytes(*id) == [0x80]).unwrap();
    let mut detokenizer = tokenizer.detokenizer(&[]);
    let text: String = (0..1_000_000).map(|_| detokenizer.push(lone)).collect();
    assert_eq!(text.chars().count(), 1_000_000);
    assert_eq!(detokenizer.finish(), "");
}
