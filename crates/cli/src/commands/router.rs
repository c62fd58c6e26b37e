//! `muster router`: from settings to a running router.

use muster_checkpoint::digests::Places;
use muster_config::{AccessMode, Fallback, PlacementMode, RouterSettings};
use muster_identity::Access;
use muster_router::serve::{
    Bound, Cors, Edge, Hooks, Placement, RouterConfig, RouterError, run as run_router,
};
use muster_router::start::{EngineSettings, PrefixCache};
use muster_types::Limits;

use super::identity;
use super::role::{self, Around};
use crate::args::{LogArgs, RoleArgs};
use crate::children::Listening;
use crate::cores::cores;
use crate::engine::model_defaults;
use crate::failure::Failure;
use crate::models;
use crate::models::Links;

pub(crate) fn run(args: &RoleArgs<RouterSettings>, log: &LogArgs) -> Result<(), Failure> {
    role::run(args, log, async |settings, Around { progress, ready, admin }| {
        let ready = |Bound { http, grpc }| {
            ready(Listening { http: Some(http), grpc: Some(grpc), ..Listening::default() });
        };
        let hooks = Hooks { progress, ready: Box::new(ready), admin };
        run_router(config(settings)?, hooks).await.map_err(|error| failure(&error))
    })
}

fn config(settings: RouterSettings) -> Result<RouterConfig, Failure> {
    let access = settings.access();
    Ok(RouterConfig {
        source: models::source(&settings.model, Links::of(settings.compute.allow_links))?,
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
        compute: settings.compute.compute,
        experts: settings.compute.expert_dtype,
        trunk: settings.trunk_dtype,
        threads: settings.compute.threads.unwrap_or(cores()),
        connect_timeout: settings.connect_timeout,
        drain_timeout: settings.drain_timeout,
        identity: identity(settings.tls.files())?,
        access: match access {
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
        numerics: settings.numerics,
        busy_poll: settings.busy_poll_us,
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
        | RouterError::Card(_)
        | RouterError::Start(_) => Failure::input(error),
        _ => Failure::runtime(error),
    }
}
