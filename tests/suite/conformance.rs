//! Every family against transformers: in one process, and through a router's trunk and two worker processes, which
//! must agree with each other to the bit.

use muster_proto::v1::inference_client::InferenceClient;
use muster_tests::client::{generate, greedy};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::elastic::{Elastic, copies};
use muster_tests::golden::{Tensors, farthest, ids, json, logits};
use muster_tests::process::{eventually, run};
use muster_tests::{families, golden_model};
use serde_json::Value;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn compare(family: &str) {
    let directory = golden_model(family);
    let meta = json(&directory.join("golden.json"));
    let golden = Tensors::read(&directory.join("golden.safetensors"));
    let atol = |kind: &str| meta["tolerance"]["atol"][kind].as_f64().unwrap() as f32;
    for prompt in ["prompt0", "prompt1"] {
        let tokens = golden.ids(&format!("{prompt}.input_ids"));
        let local = logits(&directory, &tokens, &["--compute", "f32"]);
        let remote = logits(&directory, &tokens, &["--compute", "f32", "--workers", "2"]);
        let ours = local.f32s("logits");
        assert_eq!(bits(&ours), bits(&remote.f32s("logits")), "{family} {prompt}: remote differs from local");
        let off = farthest(&ours, &golden.f32s(&format!("{prompt}.logits")));
        assert!(off <= atol("logits"), "{family} {prompt}: logits are off by {off}");
        for layer in meta["moe_layers"].as_array().unwrap() {
            let (experts, weights) = (format!("layer.{layer}.experts"), format!("layer.{layer}.weights"));
            let golden_ids = golden.i64s(&format!("{prompt}.layer{layer}.topk_ids"));
            let golden_weights = golden.f32s(&format!("{prompt}.layer{layer}.topk_weights"));
            for run in [&local, &remote] {
                assert_eq!(run.i64s(&experts), golden_ids, "{family} {prompt} layer {layer}");
                let off = farthest(&run.f32s(&weights), &golden_weights);
                assert!(
                    off <= atol("topk_weights"),
                    "{family} {prompt} layer {layer}: weights are off by {off}"
                );
            }
        }
    }
}

#[test]
fn logits_and_choices_of_every_family() {
    families().iter().for_each(|family| compare(family));
}

#[test]
fn greedy_tokens_of_every_family() {
    for family in families() {
        let directory = golden_model(&family);
        let golden = Tensors::read(&directory.join("golden.safetensors"));
        for prompt in ["prompt0", "prompt1"] {
            let tokens = golden.ids(&format!("{prompt}.input_ids"));
            let list: Vec<String> = tokens.iter().map(ToString::to_string).collect();
            let (model, list) = (directory.display().to_string(), list.join(","));
            let args = [
                "generate",
                "--model",
                &model,
                "--compute",
                "f32",
                "--prompt-tokens",
                &list,
                "--max-tokens",
                "24",
                "--ignore-eos",
                "--json",
            ];
            for workers in [&[][..], &["--workers", "2"]] {
                let args: Vec<&str> = args.iter().chain(workers).copied().collect();
                let output = run(&args);
                assert!(output.status.success(), "{family}: {}", String::from_utf8_lossy(&output.stderr));
                let output: Value = serde_json::from_slice(&output.stdout).unwrap();
                let expected = golden.ids(&format!("{prompt}.greedy_ids"));
                assert_eq!(ids(&output["token_ids"]), expected, "{family} {prompt} {workers:?}");
            }
        }
    }
}

#[test]
fn the_reference_command_is_another_opinion() {
    let directory = golden_model("qwen3_moe");
    let golden = Tensors::read(&directory.join("golden.safetensors"));
    let tokens = golden.ids("prompt1.input_ids");
    let reference = logits(&directory, &tokens, &["--reference"]).f32s("logits");
    let ours = logits(&directory, &tokens, &["--compute", "f32"]).f32s("logits");
    assert!(farthest(&reference, &golden.f32s("prompt1.logits")) <= 5e-4);
    assert_ne!(
        bits(&reference),
        bits(&ours),
        "an independent implementation would round differently somewhere"
    );
}

#[test]
fn one_two_and_four_workers_and_any_chunk_give_the_same_bits() {
    for family in ["mixtral_bf16", "granitemoe"] {
        let directory = golden_model(family);
        let tokens = Tensors::read(&directory.join("golden.safetensors")).ids("prompt1.input_ids");
        let expected = bits(&logits(&directory, &tokens, &[]).f32s("logits"));
        for extra in [
            &["--workers", "1"][..],
            &["--workers", "2"],
            &["--workers", "4"],
            &["--chunk", "7"],
            &["--chunk", "7", "--workers", "2"],
        ] {
            assert!(
                bits(&logits(&directory, &tokens, extra).f32s("logits")) == expected,
                "{family} {extra:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_and_two_workers_give_the_golden_tokens_of_every_family() {
    for family in families() {
        let directory = golden_model(&family);
        let golden = Tensors::read(&directory.join("golden.safetensors"));
        let cluster = Cluster::start(Setup::new(&directory).compute("f32"));
        let client = cluster.client().await;
        for prompt in ["prompt0", "prompt1"] {
            let mut request = greedy(&golden.ids(&format!("{prompt}.input_ids")), 24);
            request.top_logprobs = Some(0);
            let output = generate(&client, request).await.unwrap().remove(0);
            assert_eq!(output.ids, golden.ids(&format!("{prompt}.greedy_ids")), "{family} {prompt}");
            let ours: Vec<f32> = output.frames.iter().map(|frame| frame.logprob.unwrap()).collect();
            let off = farthest(&ours, &golden.f32s(&format!("{prompt}.greedy_logprobs")));
            let meta = json(&directory.join("golden.json"));
            let atol = meta["tolerance"]["atol"]["greedy_logprobs"].as_f64().unwrap() as f32;
            assert!(off <= atol, "{family} {prompt}: log-probabilities are off by {off}, allowed {atol}");
        }
    }
}

/// Workers without a model of their own take what they need to know from the router, and experts from it or each other:
/// biases, activation and published forms have to come along.
#[tokio::test(flavor = "multi_thread")]
async fn workers_that_join_without_a_model_give_the_golden_tokens() {
    const KINDS: [&str; 3] = ["gpt_oss", "llama4", "deepseek_v3_fp8"];
    for family in families().iter().filter(|family| KINDS.iter().any(|kind| family.starts_with(kind))) {
        let directory = golden_model(family);
        let golden = Tensors::read(&directory.join("golden.safetensors"));
        let mut cluster = Elastic::start(&directory, 1, &["--compute", "f32", "--replicas", "2"]);
        cluster.join(&[]);
        cluster.settled(1).await;
        cluster.join(&[]);
        eventually("each has every expert", async || {
            let status = cluster.status(0).await;
            (copies(&status) == 2 * status.experts).then_some(())
        })
        .await;
        // One of them alone, so that the other's copies count.
        cluster.workers[0].kill();
        let url = format!("http://{}", cluster.grpc()[0]);
        let client = InferenceClient::connect(url).await.unwrap();
        let request = greedy(&golden.ids("prompt1.input_ids"), 24);
        let output = generate(&client, request).await.unwrap().remove(0);
        assert_eq!(output.ids, golden.ids("prompt1.greedy_ids"), "{family}");
    }
}
