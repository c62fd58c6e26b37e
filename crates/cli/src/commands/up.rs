//! `muster up`: a whole cluster on this machine, for as long as this process lives.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;

use muster_checkpoint::Checkpoint;
use muster_kernels::Isa;
use muster_model::experts::faster_mode;
use muster_proto::v1::Model;
use muster_router::tokenizer;

use super::generate::{Output, Prompt, answer};
use crate::args::{CredentialArgs, LogArgs, UpArgs};
use crate::backend::{self, Backend};
use crate::children::{self, Announcement, Running, announce};
use crate::cluster::{GRACE, Workers, WorkersSpec, compute_flags, log_flags, shares_of_cores};
use crate::engine::compute_mode;
use crate::failure::Failure;
use crate::progress::Bars;
use crate::signals::Signals;
use crate::{models, out, text};

pub(crate) async fn run(args: &UpArgs, log: &LogArgs) -> Result<(), Failure> {
    let addresses = Addresses::of(args)?;
    // Opened here first, so that a model that cannot be served is refused once and not by every child.
    let checkpoint = models::open(&args.model)?;
    let mut signals = Signals::listen()?;
    let count = NonZeroU32::new(args.workers).unwrap_or(NonZeroU32::MIN);
    let compute = args.compute.compute.get();
    let bars = Bars::new();
    let (experts, threads, busy_poll_us) =
        (args.compute.expert_dtype, args.compute.threads, args.compute.busy_poll_us);
    let replicas = NonZeroU32::new(args.replicas).unwrap_or(NonZeroU32::MIN);
    if replicas > count {
        return Err(Failure::input(format!(
            "--replicas: {count} workers cannot hold {replicas} copies of an expert; use at most {count}"
        )));
    }
    let spec =
        WorkersSpec { model: &args.model, count, replicas, compute, experts, threads, busy_poll_us, log };
    let workers = signals.unless(Workers::start(&spec, &bars)).await?;
    let outcome = with_router(args, log, &addresses, &checkpoint, &workers, &bars, &mut signals).await;
    workers.stop().await;
    match outcome {
        // Ctrl-C is how a cluster that stays is ended.
        Err(Failure::Interrupted) if args.prompt.is_none() => Ok(()),
        outcome => outcome,
    }
}

/// Where the router listens.
struct Addresses {
    http: SocketAddr,
    grpc: SocketAddr,
}

impl Addresses {
    fn of(args: &UpArgs) -> Result<Self, Failure> {
        // A busy port must not keep a single answer from coming.
        let local = |port| {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), if args.prompt.is_some() { 0 } else { port })
        };
        let addresses =
            Self { http: args.http.unwrap_or(local(8080)), grpc: args.grpc.unwrap_or(local(50051)) };
        for (flag, address) in [("--http", addresses.http), ("--grpc", addresses.grpc)] {
            let asked = args.insecure_plaintext && args.insecure_no_keys;
            if !address.ip().is_loopback() && !asked {
                return Err(Failure::input(format!(
                    "{flag}: {address} can be reached from other machines, and `muster up` has neither TLS nor keys; use \
                     a loopback address, `muster router` and `muster worker` with --tls-cert and --api-keys, or ask for \
                     it by name with --insecure-plaintext --insecure-no-keys"
                )));
            }
        }
        Ok(addresses)
    }
}

async fn with_router(
    args: &UpArgs,
    log: &LogArgs,
    addresses: &Addresses,
    checkpoint: &Checkpoint,
    workers: &Workers,
    bars: &Bars,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let mut router = children::spawn("the router", &router_arguments(args, log, addresses, workers))?;
    let outcome = signals.unless(serve(args, checkpoint, &mut router, bars)).await;
    router.stop(GRACE).await;
    outcome
}

/// Until the prompt is answered, or else until the router ends.
async fn serve(
    args: &UpArgs,
    checkpoint: &Checkpoint,
    router: &mut Running,
    bars: &Bars,
) -> Result<(), Failure> {
    let bar = bars.bar("router".to_owned());
    let listening = router.ready(|progress| bar.update(progress)).await?;
    bar.finish();
    let (Some(http), Some(grpc)) = (listening.http, listening.grpc) else {
        return Err(Failure::runtime("the router did not say where it listens"));
    };
    if let Some(prompt) = &args.prompt {
        let backend =
            Backend::Router(backend::connect(&[grpc.to_string()], &CredentialArgs::default()).await?);
        let prompt = Prompt::Text(prompt.clone());
        let answered = answer(backend, prompt, args.max_tokens, &args.sampling, Output::Text);
        return tokio::select! {
            outcome = answered => outcome,
            status = router.exited() => Err(Failure::runtime(format!("the router ended while it answered ({status})"))),
        };
    }
    if args.announce {
        announce(&Announcement::Ready(listening));
    } else {
        let client = backend::connect(&[grpc.to_string()], &CredentialArgs::default()).await?;
        let model = client.model().await.map_err(backend::failed)?;
        out::write(&welcome(args, checkpoint, &model, http, grpc))?;
    }
    let status = router.exited().await;
    Err(Failure::runtime(format!("the router ended ({status}); its own message is above")))
}

fn router_arguments(args: &UpArgs, log: &LogArgs, addresses: &Addresses, workers: &Workers) -> Vec<OsString> {
    let count = NonZeroU32::new(args.workers).unwrap_or(NonZeroU32::MIN);
    let threads = args.compute.threads.unwrap_or(shares_of_cores(count).0);
    let mut arguments: Vec<OsString> = vec![
        "router".into(),
        "--model".into(),
        args.model.as_str().into(),
        "--http".into(),
        addresses.http.to_string().into(),
        "--grpc".into(),
        addresses.grpc.to_string().into(),
        "--threads".into(),
        threads.to_string().into(),
        "--combine".into(),
        args.compute.combine.to_string().into(),
        "--busy-poll-us".into(),
        args.compute.busy_poll_us.to_string().into(),
        "--trunk-dtype".into(),
        args.compute.trunk_dtype.to_string().into(),
        "--replicas".into(),
        args.replicas.to_string().into(),
    ];
    for address in workers.addresses() {
        arguments.extend(["--worker".into(), address.into()]);
    }
    if let Some(bytes) = args.kv_memory {
        arguments.extend(["--kv-memory".into(), format!("{bytes}B").into()]);
    }
    if args.insecure_plaintext {
        arguments.push("--insecure-plaintext".into());
    }
    if args.insecure_no_keys {
        arguments.push("--insecure-no-keys".into());
    }
    arguments.extend(compute_flags(args.compute.compute.get(), args.compute.expert_dtype));
    arguments.extend(log_flags(log));
    arguments
}

/// What a person needs to know once it runs.
fn welcome(
    args: &UpArgs,
    checkpoint: &Checkpoint,
    model: &Model,
    http: SocketAddr,
    grpc: SocketAddr,
) -> String {
    let (inventory, name) = (checkpoint.inventory(), checkpoint.name());
    let suggestions = suggestions(model, http, grpc);
    let missing =
        if model.has_tokenizer { String::new() } else { format!("\n{}.\n", tokenizer::remedy(checkpoint)) };
    let compute = compute_mode(checkpoint, args.compute.compute.get());
    let hint =
        faster_mode(compute, Isa::detect()).map_or_else(String::new, |hint| format!("\nHint: {hint}.\n"));
    format!(
        "{name} ({family}, {parameters} parameters, {active} active per token) is served by 1 router and {workers} workers\n\
         \n  OpenAI HTTP  http://{http}/v1\n  gRPC         http://{grpc}\n\
         {missing}\nNow try, in another terminal:\n\n{suggestions}{hint}\nCtrl-C stops everything.\n",
        family = checkpoint.spec().family,
        parameters = text::count(inventory.parameters),
        active = text::count(inventory.active_parameters),
        workers = args.workers,
    )
}

/// Commands that work with what the model has.
fn suggestions(model: &Model, http: SocketAddr, grpc: SocketAddr) -> String {
    let program = std::env::args().next().unwrap_or_else(|| "muster".to_owned());
    let name = &model.name;
    if !model.has_tokenizer {
        return format!("  {program} generate --prompt-tokens 1,2,3 --json --grpc http://{grpc}\n");
    }
    let chat = if model.has_chat_template {
        format!("  {program} chat --grpc http://{grpc}\n")
    } else {
        String::new()
    };
    format!(
        "{chat}  {program} generate \"Once upon a time\" --grpc http://{grpc}\
         \n  curl http://{http}/v1/completions -H 'Content-Type: application/json' \\\
         \n    -d '{{\"model\": \"{name}\", \"prompt\": \"Once upon a time\", \"max_tokens\": 40}}'\n"
    )
}
