//! Workers of two numerics classes: a real one, and one whose outputs differ in their lowest bits.

use muster_proto::expert::v1::NumericsClass;
use muster_proto::v1::generate_event::Event;
use muster_proto::v1::{Finished, GenerateRequest, Resume, Started, TokenIds};
use muster_tests::client::greedy;
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::liar::Liar;
use muster_tests::{demo_model, http};
use serde_json::json;
use tonic::{Code, Status};

/// A stream up to its end or failure.
struct Stream {
    started: Started,
    ids: Vec<u32>,
    end: Result<Finished, Status>,
}

/// Runs a request, and `then` after the first tokens.
async fn run(cluster: &mut Cluster, request: GenerateRequest, then: impl FnOnce(&mut Cluster)) -> Stream {
    let mut stream = cluster.client().await.generate(request).await.expect("it is taken").into_inner();
    let first = stream.message().await.unwrap().unwrap().event.unwrap();
    let Event::Started(started) = first else { panic!("{first:?}") };
    let (mut ids, mut then) = (Vec::new(), Some(then));
    loop {
        match stream.message().await {
            Ok(Some(event)) => match event.event.unwrap() {
                Event::Token(frame) => ids.push(frame.token_id),
                Event::Finished(finished) => return Stream { started, ids, end: Ok(finished) },
                Event::Started(_) => panic!("started twice"),
            },
            Ok(None) => panic!("a stream without an end"),
            Err(status) => return Stream { started, ids, end: Err(status) },
        }
        if ids.len() == 5
            && let Some(then) = then.take()
        {
            tokio::task::block_in_place(|| then(cluster));
        }
    }
}

fn nothing(_: &mut Cluster) {}

/// A CPU worker and one announced as CUDA; both hold all experts.
async fn cpu_and_cuda(numerics: &str) -> (Cluster, Liar) {
    let setup = Setup::new(&demo_model()).shares(&["all", "all"]).compute("f32").tcp();
    let setup = setup.router_args(&["--placement", "static", "--numerics", numerics]);
    let mut device = None;
    let cluster = Cluster::start_through(setup, async |workers| {
        let [cpu, behind] = &workers[..] else { panic!("two workers") };
        let cuda = Liar::of_class("cuda", NumericsClass::CudaMma, behind).await.expect("it listens");
        let addresses = vec![cpu.clone(), cuda.address.clone()];
        device = Some(cuda);
        addresses
    })
    .await;
    (cluster, device.expect("it was started"))
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_are_of_one_class_and_end_when_it_is_gone() {
    let (mut cluster, cuda) = cpu_and_cuda("exact").await;
    let request = || greedy(&[6, 90, 700], 60);
    let mut alone = Cluster::start(Setup::new(&demo_model()).shares(&["all"]).compute("f32"));
    let expected = run(&mut alone, request(), nothing).await;
    let before = run(&mut cluster, request(), nothing).await;
    assert_eq!(before.ids, expected.ids);
    assert_eq!(before.started.numerics, "cpu-canonical");
    assert!(before.end.unwrap().numerics.is_empty(), "it is told once");
    assert_eq!(before.started.resume_key, expected.started.resume_key, "a cluster of CPUs could go on");
    assert_eq!(cuda.told(), [0], "it was never asked");

    let broken = run(&mut cluster, greedy(&[6, 90, 701], 500), |cluster| cluster.workers[0].kill()).await;
    let status = broken.end.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(
        status.message().contains("numerics class") && status.message().contains("send the request anew")
    );

    let after = run(&mut cluster, request(), nothing).await;
    assert_eq!(after.started.numerics, "cuda-mma");
    assert!(after.end.is_ok());
    assert_ne!(after.started.resume_key, before.started.resume_key);
    assert!(cuda.told()[0] > 0);
    // A stream begun on CPUs is not resumed on the CUDA device.
    let choices = vec![TokenIds { ids: before.ids[..10].to_vec() }];
    let resume_from = Some(Resume { choices, key: Some(before.started.resume_key) });
    let resumed = cluster.client().await.generate(GenerateRequest { resume_from, ..request() }).await;
    let status = resumed.expect_err("it is refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("numerics class"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_any_will_do_answers_say_so() {
    let (mut cluster, cuda) = cpu_and_cuda("any").await;
    let stream = run(&mut cluster, greedy(&[6, 90, 700], 60), nothing).await;
    assert_eq!(stream.started.numerics, "any");
    assert_eq!(stream.end.unwrap().numerics, ["cpu-canonical", "cuda-mma"]);
    assert!(cuda.told()[0] > 0);
    let answer = http::post(&cluster.http(), "/v1/completions", &json!({"prompt": "Once", "max_tokens": 4}));
    let fingerprint = answer.json()["system_fingerprint"].as_str().unwrap().to_owned();
    assert!(fingerprint.ends_with("_any"), "{fingerprint}");
    // One worker suffices to continue.
    let stream = run(&mut cluster, greedy(&[6, 90, 701], 200), |cluster| cluster.workers[0].kill()).await;
    assert!(stream.end.is_ok());
}
