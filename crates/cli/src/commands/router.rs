//! `muster router`: settings to a running router.

use std::sync::Arc;

use muster_admin::Admin;
use muster_checkpoint::digests::Places;
use muster_config::{AccessMode, Environment, Fallback, Flags, PlacementMode, RouterSettings, Sources};
use muster_identity::Access;
use muster_router::serve::{
    Bound, Cors, Edge, Hooks, Placement, RouterConfig, RouterError, run as run_router,
};
use muster_router::start::{EngineSettings, PrefixCache};
use muster_telemetry::Process;
use muster_types::Limits;

use super::{identity, log_settings, persist, serve};
use crate::args::{LogArgs, RouterArgs};
use crate::children::{Listening, exit_with_parent};
use crate::engine::{cores, model_defaults};
use crate::failure::Failure;
use crate::models::Links;
use crate::outlet::Outlet;
use crate::signals::Signals;
use crate::{models, out};

pub(crate) fn run(args: &RouterArgs, log: &LogArgs) -> Result<(), Failure> {
    let flags = flags(args, log);
    let environment = Environment::of_process();
    let sources = Sources { file: args.config.config.as_deref(), environment: &environment, flags: &flags };
    let loaded = RouterSettings::load(&sources).map_err(Failure::input)?;
    if args.config.print_config {
        return out::write(&loaded.effective);
    }
    let settings = loaded.settings;
    if args.config.exit_with_parent {
        exit_with_parent()?;
    }
    let log = settings.log.clone();
    let outlet = Outlet::of(&args.config, "router");
    serve(&log, async move {
        let signals = Signals::listen()?;
        let metrics = muster_telemetry::install_metrics(Process::Router).map_err(Failure::runtime)?;
        let stop = signals.drain_then_exit();
        let rendered = metrics.clone();
        let admin = Admin::new(move || rendered.render());
        let address = match settings.admin {
            Some(address) => Some(admin.listen(address).await.map_err(Failure::input)?),
            None => None,
        };
        persist(&admin, address.is_some(), &stop, async || {
            let (progress, ready) = (outlet.progress(), outlet.ready());
            let metrics = metrics.clone();
            let hooks = Hooks {
                progress,
                ready: Box::new(move |Bound { http, grpc }| {
                    let (http, grpc) = (Some(http), Some(grpc));
                    ready(Listening { http, grpc, admin: address, ..Listening::default() });
                }),
                metrics: Arc::new(move || metrics.render()),
                admin: admin.clone(),
            };
            let config = config(settings.clone())?;
            run_router(config, hooks, stop.clone().cancelled_owned()).await.map_err(|error| failure(&error))
        })
        .await
    })
}

fn flags(args: &RouterArgs, log: &LogArgs) -> Flags {
    let flags = Flags::new()
        .text("model", args.model.as_deref())
        .text("model_name", args.model_name.as_deref())
        .text("digests", args.digests.as_deref())
        .list("workers", &args.workers)
        .list("discover", &args.discover)
        .text("lease", args.lease.as_deref())
        .text("placement", args.placement.as_deref())
        .text("replicas", args.replicas.as_deref())
        .text("fallback", args.fallback.as_deref())
        .text("http", args.http.as_deref())
        .text("grpc", args.grpc.as_deref())
        .text("id", args.id.as_deref())
        .text("compute", args.compute.as_deref())
        .text("expert_dtype", args.expert_dtype.as_deref())
        .text("trunk_dtype", args.trunk_dtype.as_deref())
        .text("threads", args.threads.as_deref())
        .text("kv_memory", args.kv_memory.as_deref())
        .text("step_tokens", args.step_tokens.as_deref())
        .text("prefill_chunk", args.prefill_chunk.as_deref())
        .text("prefix_cache", args.prefix_cache.as_deref())
        .list("template_variables", &args.template_variables)
        .text("generation_config", args.generation_config.as_deref())
        .text("max_running", args.max_running.as_deref())
        .text("max_queue", args.max_queue.as_deref())
        .text("max_queue_wait", args.max_queue_wait.as_deref())
        .text("expert_timeout", args.expert_timeout.as_deref())
        .text("connect_timeout", args.connect_timeout.as_deref())
        .text("drain_timeout", args.drain_timeout.as_deref())
        .text("combine", args.combine.as_deref())
        .text("busy_poll_us", args.busy_poll_us.as_deref());
    let flags =
        flags.text("leave_after", args.leave_after.as_deref()).text("api_keys", args.api_keys.as_deref());
    let flags = if args.insecure_plaintext { flags.on("insecure_plaintext") } else { flags };
    let flags = if args.insecure_no_keys { flags.on("insecure_no_keys") } else { flags };
    let flags = if args.links.allow_links { flags.on("allow_links") } else { flags };
    let flags = args.edge.flags(args.tls.flags(flags));
    log_settings(flags, log)
}

fn config(settings: RouterSettings) -> Result<RouterConfig, Failure> {
    Ok(RouterConfig {
        source: models::source(&settings.model, Links::of(settings.allow_links))?,
        digests: Places { file: settings.digests, cache: models::cache(), ..Places::default() },
        model_name: settings.model_name,
        router_id: settings.id,
        workers: settings.workers.iter().map(ToString::to_string).collect(),
        discover: settings.discover,
        lease: settings.lease,
        placement: match settings.placement {
            PlacementMode::Auto => Placement::Led,
            PlacementMode::Static => Placement::Static,
        },
        replicas: settings.replicas,
        fallback: settings.fallback == Fallback::Local,
        http: settings.http,
        grpc: settings.grpc,
        compute: settings.compute,
        experts: settings.experts,
        trunk: settings.trunk,
        threads: settings.threads.unwrap_or(cores()),
        connect_timeout: settings.connect_timeout,
        drain_timeout: settings.drain_timeout,
        identity: identity(settings.tls)?,
        access: match settings.access {
            AccessMode::Open => Access::Open,
            AccessMode::Certificates => Access::Known(None),
            AccessMode::Keys(file) => {
                Access::by_keys(file).map_err(|error| Failure::input(format!("--api-keys: {error}")))?
            }
        },
        leave_after: settings.leave_after,
        edge: Edge {
            keep_alive: settings.edge.keep_alive,
            cors: Cors::new(settings.edge.cors_origins, settings.http.ip().is_loopback()),
        },
        combine: settings.combine,
        busy_poll: settings.busy_poll,
        defaults: model_defaults(settings.generation_config),
        engine: EngineSettings {
            kv_bytes: settings.kv_memory,
            step_tokens: settings.step_tokens,
            prefill_chunk: settings.prefill_chunk,
            prefix_cache: if settings.prefix_cache { PrefixCache::On } else { PrefixCache::Off },
            template_variables: settings.template_variables.into_iter().collect(),
            expert_timeout: settings.expert_timeout,
            max_queue_wait: settings.max_queue_wait,
            limits: Limits {
                running: settings.max_running,
                queue: settings.max_queue,
                choices: settings.edge.max_choices,
                stops: settings.edge.max_stops,
                bias: settings.edge.max_bias,
                body_bytes: settings.edge.max_body,
                prompt_bytes: settings.edge.max_body / 2,
                ..Limits::default()
            },
        },
    })
}

fn failure(error: &RouterError) -> Failure {
    match error {
        RouterError::Bind { .. }
        | RouterError::Identity(_)
        | RouterError::Checkpoint(_)
        | RouterError::Model(_)
        | RouterError::Start(_) => Failure::input(error),
        _ => Failure::runtime(error),
    }
}
