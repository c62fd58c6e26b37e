//! `muster up`: a whole cluster on this machine, for as long as this process lives.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_config::GenerationMode;
use muster_kernels::Isa;
use muster_model::card::expert_shape;
use muster_model::defaults::{SamplingDefaults, Wanted};
use muster_model::experts::faster_mode;
use muster_proto::v1;
use muster_router::serve::RouterError;
use muster_router::start::check_kv;
use muster_router::tokenizer;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::generate::{Output, Prompt, answer};
use crate::args::{CredentialArgs, LogArgs, UpArgs};
use crate::backend::{self, Backend};
use crate::children::{Announcement, Listening, announce};
use crate::cluster::{ClusterSpec, Workers};
use crate::failure::Failure;
use crate::kept::Kept;
use crate::progress::Bars;
use crate::signals::Signals;
use crate::{models, out, text};

pub(crate) async fn run(args: &UpArgs, log: &LogArgs) -> Result<(), Failure> {
    let addresses = Addresses::of(args)?;
    if args.prompt.is_none()
        && let Some(flag) = args.sampling.of_a_request()
    {
        return Err(Failure::input(format!(
            "{flag} is for --prompt: requests to a cluster say themselves how they are sampled"
        )));
    }
    // Opened here first, so that an unusable model is refused once and not by every child.
    let model = Model::open(args)?;
    let compute = model.checkpoint.compute(args.compute.compute.get());
    check_kv(&model.checkpoint, compute, args.kv_memory)
        .map_err(|error| Failure::input(format!("--kv-memory: {error}")))?;
    let mut signals = Signals::listen()?;
    addresses.check()?;
    let bars = Bars::new();
    let spec = ClusterSpec {
        model: &args.model,
        links: args.links.links(),
        count: NonZeroU32::new(args.workers).unwrap_or(NonZeroU32::MIN),
        experts_in_all: expert_shape(&model.checkpoint).total(),
        replicas: args.replicas,
        compute: args.compute,
        log,
    };
    let workers = signals.unless(Workers::start(&spec, &bars)).await?;
    let router = Router::start(router_arguments(args, &spec, &workers), addresses, &bars);
    let outcome = signals.unless(serve(args, &model, router.is_ready)).await;
    router.stop.cancel();
    let _ = router.task.await;
    workers.stop().await;
    match outcome {
        // Ctrl-C is the normal end of a cluster without `--prompt`.
        Err(Failure::Interrupted) if args.prompt.is_none() => Ok(()),
        outcome => outcome,
    }
}

/// The served model.
struct Model {
    checkpoint: Checkpoint,
    /// Sampling defaults.
    sampling: SamplingDefaults,
}

impl Model {
    fn open(args: &UpArgs) -> Result<Self, Failure> {
        let checkpoint = models::open(&args.model, args.links.links())?;
        let sampling = match args.sampling.generation_config {
            GenerationMode::Auto => Wanted::of(&checkpoint).map_err(Failure::input)?.defaults,
            GenerationMode::Ignore => SamplingDefaults::default(),
        };
        Ok(Self { checkpoint, sampling })
    }
}

/// Addresses on which the router listens.
#[derive(Clone, Copy)]
struct Addresses {
    http: SocketAddr,
    grpc: SocketAddr,
}

impl Addresses {
    fn of(args: &UpArgs) -> Result<Self, Failure> {
        // With `--prompt`, a free port: a busy one must not prevent the answer.
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

    /// Binds both addresses, so that a busy port is known before minutes of loading.
    fn check(&self) -> Result<(), Failure> {
        let listen = |what, address| {
            let bind = |source| RouterError::Bind { what, address, source };
            muster_net::listen::tcp(address).map_err(bind).map_err(Failure::input)
        };
        // Both at once: they may be equal.
        let listeners = (listen("http", self.http)?, listen("grpc", self.grpc)?);
        drop(listeners);
        Ok(())
    }
}

/// The router process, restarted when it dies.
struct Router {
    /// Its addresses, once it listens.
    is_ready: oneshot::Receiver<Result<Listening, Failure>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Router {
    /// Starts the router. When it dies, it is restarted at the same addresses.
    fn start(arguments: Vec<OsString>, addresses: Addresses, bars: &Bars) -> Self {
        let at = move |first: Option<&Listening>| {
            let Addresses { http, grpc } = addresses;
            let (http, grpc) =
                first.map_or((http, grpc), |first| (first.http.unwrap_or(http), first.grpc.unwrap_or(grpc)));
            let listens = ["--http".to_owned(), http.to_string(), "--grpc".to_owned(), grpc.to_string()];
            arguments.iter().cloned().chain(listens.map(OsString::from)).collect()
        };
        let (ready, is_ready) = oneshot::channel();
        let stop = CancellationToken::new();
        let router = Kept { name: "the router".to_owned(), arguments: at, pid: Arc::default() };
        let task = tokio::spawn(router.keep(bars.bar("router".to_owned()), ready, stop.clone()));
        Self { is_ready, stop, task }
    }
}

/// Serves until the prompt is answered, or for ever without one.
async fn serve(
    args: &UpArgs,
    model: &Model,
    is_ready: oneshot::Receiver<Result<Listening, Failure>>,
) -> Result<(), Failure> {
    // A task that ends without an answer was stopped.
    let listening = is_ready.await.unwrap_or(Err(Failure::Interrupted))?;
    let (Some(http), Some(grpc)) = (listening.http, listening.grpc) else {
        return Err(Failure::runtime("the router did not say where it listens"));
    };
    if let Some(prompt) = &args.prompt {
        let backend =
            Backend::Router(backend::connect(&[grpc.to_string()], &CredentialArgs::default()).await?);
        let prompt = Prompt::Text(prompt.clone());
        return answer(backend, prompt, args.max_tokens, &args.sampling, Output::Text).await;
    }
    if args.announce {
        announce(&Announcement::Ready(listening));
    } else {
        let client = backend::connect(&[grpc.to_string()], &CredentialArgs::default()).await?;
        let served = client.model().await.map_err(backend::failed)?;
        out::write(&welcome(args, model, &served, http, grpc))?;
    }
    std::future::pending().await
}

/// Arguments of the router, without its listening addresses.
fn router_arguments(args: &UpArgs, spec: &ClusterSpec<'_>, workers: &Workers) -> Vec<OsString> {
    let mut arguments = spec.router_arguments(workers);
    arguments.extend(["--generation-config".into(), args.sampling.generation_config.to_string().into()]);
    if let Some(bytes) = args.kv_memory {
        arguments.extend(["--kv-memory".into(), format!("{bytes}B").into()]);
    }
    if args.insecure_plaintext {
        arguments.push("--insecure-plaintext".into());
    }
    if args.insecure_no_keys {
        arguments.push("--insecure-no-keys".into());
    }
    arguments
}

/// Welcome text: addresses and first commands.
fn welcome(args: &UpArgs, model: &Model, served: &v1::Model, http: SocketAddr, grpc: SocketAddr) -> String {
    let Model { checkpoint, sampling } = model;
    let (inventory, name) = (checkpoint.inventory(), checkpoint.name());
    let suggestions = suggestions(served, http, grpc);
    let missing =
        if served.has_tokenizer { String::new() } else { format!("\n{}.\n", tokenizer::remedy(checkpoint)) };
    let compute = checkpoint.compute(args.compute.compute.get());
    let hint =
        faster_mode(compute, Isa::detect()).map_or_else(String::new, |hint| format!("\nHint: {hint}.\n"));
    format!(
        "{name} ({family}, {parameters} parameters, {active} active per token) is served by 1 router and {workers} workers\n\
         \n  OpenAI HTTP  http://{http}/v1\n  gRPC         http://{grpc}\n  sampling     {sampling}, where a request says nothing\n\
         {missing}\nNow try, in another terminal:\n\n{suggestions}{hint}\nCtrl-C stops everything.\n",
        family = checkpoint.spec().family,
        parameters = text::count(inventory.parameters),
        active = text::count(inventory.active_parameters),
        workers = args.workers,
    )
}

/// Suggested commands that suit the model.
fn suggestions(model: &v1::Model, http: SocketAddr, grpc: SocketAddr) -> String {
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
