//! Ids, decoded text and rendered chats are the reference implementation's.

mod common;

use common::{DEMO, MIXTRAL, demo, ids, json, message, mixtral, read_message};
use muster_text::{ChatMessage, GenerationPrompt, Special, SpecialText};
use serde_json::Value;

#[test]
fn strings_encode_and_decode_as_the_reference_does() {
    let (tokenizer, golden) = (mixtral(), json(&format!("{MIXTRAL}/golden_tokenizer.json")));
    let strings = golden["strings"].as_array().unwrap();
    assert!(strings.len() >= 12);
    for string in strings {
        let text = string["text"].as_str().unwrap();
        let plain = tokenizer.encode(text, Special::Omit).unwrap();
        assert_eq!(plain, ids(&string["ids"]), "{text:?}");
        assert_eq!(tokenizer.encode(text, Special::Add).unwrap(), ids(&string["ids_with_bos"]), "{text:?}");
        assert_eq!(tokenizer.decode(&plain, SpecialText::Keep).unwrap(), text);
        let dropped = tokenizer.decode(&plain, SpecialText::Drop).unwrap();
        assert_eq!(dropped, string["decoded_without_special"].as_str().unwrap());
    }
}

#[test]
fn special_tokens_have_their_ids() {
    let (tokenizer, golden) = (mixtral(), json(&format!("{MIXTRAL}/golden_tokenizer.json")));
    for (token, id) in golden["special"].as_object().unwrap() {
        let id = u32::try_from(id.as_u64().unwrap()).unwrap();
        assert_eq!(tokenizer.token_text(id), *token);
        assert_eq!(tokenizer.encode_chat(token).unwrap(), [id]);
        assert_eq!(tokenizer.decode(&[id], SpecialText::Drop).unwrap(), "");
    }
    let names: Vec<(&str, &str)> = tokenizer.named_tokens().iter().collect();
    assert_eq!(names, [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")]);
}

#[test]
fn chats_render_and_encode_as_the_reference_does() {
    let (tokenizer, golden) = (mixtral(), json(&format!("{MIXTRAL}/golden_tokenizer.json")));
    let chats = golden["chats"].as_array().unwrap();
    assert!(chats.len() >= 4);
    for chat in chats {
        let prompt = match chat["add_generation_prompt"] {
            Value::Bool(true) => GenerationPrompt::Add,
            _ => GenerationPrompt::Omit,
        };
        let messages: Vec<ChatMessage> =
            chat["messages"].as_array().unwrap().iter().map(read_message).collect();
        let rendered = tokenizer.chat_template().unwrap().render(&messages.into(), prompt, None).unwrap();
        assert_eq!(rendered, chat["rendered"].as_str().unwrap());
        assert_eq!(tokenizer.encode_chat(&rendered).unwrap(), ids(&chat["ids"]));
    }
}

#[test]
fn demo_models_prompts_and_answers_are_the_references() {
    let (tokenizer, golden) = (demo(), json(&format!("{DEMO}/golden.json")));
    let prompts = golden["prompts"].as_array().unwrap();
    assert!(prompts.iter().any(|p| p["chat"] == true) && prompts.iter().any(|p| p["chat"] == false));
    for case in prompts {
        let prompt = case["prompt"].as_str().unwrap();
        let encoded = if case["chat"] == true {
            let template = tokenizer.chat_template().unwrap();
            let rendered =
                template.render(&vec![message("user", prompt)].into(), GenerationPrompt::Add, None).unwrap();
            tokenizer.encode_chat(&rendered).unwrap()
        } else {
            tokenizer.encode(prompt, Special::Add).unwrap()
        };
        assert_eq!(encoded, ids(&case["prompt_ids"]), "{prompt}");
        let answer = tokenizer.decode(&ids(&case["ids"]), SpecialText::Keep).unwrap();
        assert_eq!(answer, case["text"].as_str().unwrap());
    }
}
