//! Upper bound of a normalizer's growth of a text: one whose steps each double it would take memory without end.
//!
//! What must hold: no text grows by more than the product of what the steps can do each. Character maps (`Precompiled`) are taken
//! for those of Unicode, which is what they are made from.

use serde_json::Value;
use tokenizers::Tokenizer;

/// Published tokenizers stay below 600.
const MOST: u64 = 4096;
/// Of Unicode's compatibility forms: U+FDFA has 3 bytes, and 33 when it is decomposed.
const UNICODE: u64 = 11;
/// A character that gets a space before and behind, or another case.
const CHARACTER: u64 = 3;

/// Refuses a tokenizer that could make a text longer than any real one does.
///
/// # Errors
/// The growth, in words.
pub(crate) fn check(library: &Tokenizer) -> Result<(), String> {
    let Some(normalizer) = library.get_normalizer() else { return Ok(()) };
    let json = serde_json::to_value(normalizer).map_err(|error| error.to_string())?;
    let times = factor(&json);
    if times > MOST {
        return Err(format!(
            "its normalizer can make a text {times} times as long; at most {MOST} times is allowed"
        ));
    }
    Ok(())
}

/// By how much the bytes of a text can be multiplied.
fn factor(json: &Value) -> u64 {
    let content = json["content"].as_str().or(json["prepend"].as_str()).map_or(0, |text| text.len() as u64);
    match json["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            let steps = json["normalizers"].as_array().map(Vec::as_slice).unwrap_or_default();
            steps.iter().map(factor).fold(1, u64::saturating_mul)
        }
        "Replace" => match json["pattern"]["String"].as_str().map_or(0, |text| text.len() as u64) {
            // Between all bytes, as far as is known of an expression.
            0 => content.saturating_add(1),
            length => content.div_ceil(length).max(1),
        },
        // Before every part between added tokens, of which the least has a byte.
        "Prepend" => content.saturating_add(1),
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Nmt" | "Precompiled" => UNICODE,
        "BertNormalizer" => UNICODE * CHARACTER,
        "Lowercase" => CHARACTER,
        // Two characters for a byte.
        "ByteLevel" => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_that_each_double_a_text_are_too_much() {
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let times = |count: usize| factor(&json!({"type": "Sequence", "normalizers": vec![&double; count]}));
        assert_eq!((times(3), times(40), times(100)), (8, 1 << 40, u64::MAX));
        for (step, expected) in [
            (json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}), 3),
            (json!({"type": "Replace", "pattern": {"String": "``"}, "content": "\""}), 1),
            (json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}), 2),
            (json!({"type": "Replace", "pattern": {"String": ""}, "content": "ab"}), 3),
            (json!({"type": "Prepend", "prepend": "▁"}), 4),
            (json!({"type": "NFKC"}), 11),
            (json!({"type": "Strip"}), 1),
        ] {
            assert_eq!(factor(&step), expected, "{step}");
        }
    }
}
