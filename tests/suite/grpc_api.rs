//! The public gRPC API: answers, refusals, health, reflection.

use muster_proto::v1::generate_request::Prompt;
use muster_proto::v1::{
    Chat, ChatMessage, DetokenizeRequest, GenerateRequest, GetModelRequest, Sampling, Stop, TokenizeRequest,
};
use muster_tests::client::{generate, greedy};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::golden::{ids, json};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn model_tokenize_detokenize_and_chat() {
    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    let mut client = cluster.client().await;
    let model = client.get_model(GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!((model.family.as_str(), model.layers, model.moe_layers), ("mixtral", 6, 6));
    assert_eq!((model.experts_per_layer, model.experts_per_token, model.vocabulary), (8, 2, 4096));
    assert_eq!((model.context, model.compute.as_str(), model.workers), (512, "f32", 2));
    assert!(model.has_tokenizer && model.has_chat_template);
    assert_eq!(model.fingerprint.len(), 64);

    let golden = json(&demo_model().join("golden.json"));
    for case in golden["prompts"].as_array().unwrap() {
        let (text, chat) = (case["prompt"].as_str().unwrap(), case["chat"].as_bool().unwrap());
        let prompt = if chat {
            let message = ChatMessage { role: "user".into(), content: text.into() };
            Prompt::Chat(Chat { messages: vec![message] })
        } else {
            let tokenized =
                client.tokenize(TokenizeRequest { text: text.into(), ..Default::default() }).await;
            assert_eq!(tokenized.unwrap().into_inner().ids, ids(&case["prompt_ids"]), "{text:?}");
            Prompt::Text(text.into())
        };
        let request = GenerateRequest {
            prompt: Some(prompt),
            max_tokens: Some(40),
            stop: Some(Stop { ignore_eos: true, ..Stop::default() }),
            ..GenerateRequest::default()
        };
        let output = generate(&client, request).await.unwrap();
        assert_eq!(output[0].ids, ids(&case["ids"]), "{text:?}");
        let request = DetokenizeRequest { ids: output[0].ids.clone(), with_special: false };
        let text = client.detokenize(request).await.unwrap().into_inner().text;
        assert_eq!(text, output[0].text, "streamed text is the whole text");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stops_and_logprobs() {
    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    let client = cluster.client().await;
    let prompt = [1, 844, 624, 265, 556];
    let whole = generate(&client, greedy(&prompt, 40)).await.unwrap().remove(0);

    let mut request = greedy(&prompt, 40);
    request.stop = Some(Stop { strings: vec!["big smile".into()], ignore_eos: true, ..Stop::default() });
    let output = generate(&client, request).await.unwrap().remove(0);
    assert_eq!(output.reason, "stop");
    assert_eq!(output.text, whole.text.split("big smile").next().unwrap());

    let mut request = greedy(&prompt, 40);
    request.stop = Some(Stop { token_ids: vec![whole.ids[5]], ignore_eos: true, ..Stop::default() });
    let output = generate(&client, request).await.unwrap().remove(0);
    assert_eq!((output.reason, &output.ids[..]), ("stop", &whole.ids[..5]));

    let mut request = greedy(&prompt, 8);
    request.top_logprobs = Some(3);
    let output = generate(&client, request).await.unwrap().remove(0);
    for frame in &output.frames {
        assert_eq!(frame.top.len(), 3);
        assert_eq!(frame.top[0].token_id, frame.token_id, "greedy takes the likeliest");
        assert_eq!(frame.logprob, Some(frame.top[0].logprob));
        assert!(frame.top[0].logprob <= 0.0 && frame.top[0].logprob >= frame.top[1].logprob);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_field_and_serving_goes_on() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let good = greedy(&[1, 844], 4);
    let expected = generate(&client, good.clone()).await.unwrap();
    let sampling = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        GenerateRequest { sampling: Some(sampling), ..greedy(&[1, 844], 4) }
    };
    let stop = |strings: Vec<String>| GenerateRequest {
        stop: Some(Stop { strings, ..Stop::default() }),
        ..greedy(&[1, 844], 4)
    };
    let cases: Vec<(&str, GenerateRequest)> = vec![
        ("prompt", GenerateRequest { prompt: None, ..greedy(&[], 4) }),
        ("prompt", greedy(&[], 4)),
        ("prompt", greedy(&[4096], 4)),
        ("prompt", greedy(&[u32::MAX], 4)),
        ("prompt", greedy(&[7; 512], 1)),
        ("prompt", greedy(&vec![7; 100_000], 1)),
        ("max_tokens", greedy(&[1], 0)),
        ("max_tokens", greedy(&[1], 512)),
        ("max_tokens", greedy(&[1], u32::MAX)),
        ("choices", GenerateRequest { choices: Some(1_000_000), ..greedy(&[1], 4) }),
        ("choices", GenerateRequest { choices: Some(0), ..greedy(&[1], 4) }),
        ("top_logprobs", GenerateRequest { top_logprobs: Some(1_000_000_000), ..greedy(&[1], 4) }),
        ("stop", stop(vec!["x".into(); 1000])),
        ("stop", stop(vec![String::new()])),
        ("stop", stop(vec!["x".repeat(1 << 20)])),
        ("temperature", sampling(|s| s.temperature = Some(-1.0))),
        ("temperature", sampling(|s| s.temperature = Some(f32::NAN))),
        ("temperature", sampling(|s| s.temperature = Some(f32::INFINITY))),
        ("top_p", sampling(|s| s.top_p = Some(0.0))),
        ("min_p", sampling(|s| s.min_p = Some(f32::NAN))),
        ("repetition_penalty", sampling(|s| s.repetition_penalty = Some(-1.0))),
        ("presence_penalty", sampling(|s| s.presence_penalty = Some(1e30))),
        ("frequency_penalty", sampling(|s| s.frequency_penalty = Some(f32::NAN))),
        ("logit_bias", sampling(|s| s.logit_bias = [(4096, 1.0)].into())),
        ("logit_bias", sampling(|s| s.logit_bias = (0..2000).map(|id| (id, 1.0)).collect())),
        ("messages", GenerateRequest { prompt: Some(Prompt::Chat(Chat::default())), ..greedy(&[], 4) }),
    ];
    for (field, request) in cases {
        let status = generate(&client, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        assert!(status.message().contains(field), "{field:?} is not named: {status}");
        assert!(!status.message().contains('/'), "no paths in errors: {status}");
    }
    let other = GenerateRequest { model: "../..".into(), ..good.clone() };
    assert_eq!(generate(&client, other).await.unwrap_err().code(), Code::NotFound);
    let huge = GenerateRequest { prompt: Some(Prompt::Text("x".repeat(100 << 20))), ..good.clone() };
    let code = generate(&client, huge).await.unwrap_err().code();
    assert!([Code::OutOfRange, Code::ResourceExhausted, Code::InvalidArgument].contains(&code), "{code:?}");
    assert_eq!(generate(&client, good).await.unwrap(), expected);
}
