//! Layers, their order, and every kind of configuration problem.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use muster_config::{
    AccessMode, ConfigError, Environment, Flags, GenerationMode, Loaded, RoleSettings as _, RouterSettings,
    Sources, WorkerSettings,
};
use muster_placement::Share;
use muster_types::WeightDType;
use proptest::prelude::*;
use tempfile::NamedTempFile;

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment::of(variables.iter().map(|(name, value)| (name.into(), value.into())))
}

fn minimal() -> Flags {
    Flags::new().text("model", Some("demo")).list("workers", &["127.0.0.1:7070".to_owned()])
}

fn router(
    text: &str,
    variables: &[(&str, &str)],
    flags: &Flags,
) -> Result<Loaded<RouterSettings>, ConfigError> {
    let file = file(text);
    RouterSettings::load(&Sources { file: Some(file.path()), environment: &environment(variables), flags })
}

/// Problems of a router with this file, without the name of the temporary file.
fn problems(text: &str) -> Vec<String> {
    let file = file(text);
    let sources =
        Sources { file: Some(file.path()), environment: &Environment::default(), flags: &minimal() };
    let error = RouterSettings::load(&sources).map(|loaded| loaded.settings).unwrap_err();
    let name = file.path().display().to_string();
    error.problems.iter().map(|problem| problem.to_string().replace(&name, "FILE")).collect()
}

#[test]
fn sources_of_workers_and_a_lease_are_checked() {
    let text = "[router]\ndiscover = [\"kubernetes:ns/workers\", \"dns:workers:7070\"]\nlease = \"kubernetes:leader\"\n";
    let settings = router(text, &[], &minimal()).unwrap().settings;
    let sources: Vec<_> = settings.discover.iter().map(ToString::to_string).collect();
    assert_eq!(sources, ["kubernetes:ns/workers", "dns:workers:7070"]);
    assert_eq!(settings.lease.unwrap().to_string(), "kubernetes:leader");
    let bad = "[router]\ndiscover = [\"workers\", \"dns:h:1\", \"dns:h:1\"]\nlease = \"leader\"\n";
    let problems = problems(bad);
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(
        problems[0].contains("discover: \"workers\" is no source of workers; write kubernetes:SERVICE"),
        "{problems:?}"
    );
    assert!(problems[2].contains("dns:h:1 is listed twice"), "{problems:?}");
    assert!(
        problems[1].contains("lease: \"leader\" names no object of a cluster; write kubernetes:NAME"),
        "{problems:?}"
    );
    let idle = "[router]\nplacement = \"static\"\nlease = \"kubernetes:leader\"\n";
    assert!(self::problems(idle)[0].contains("with placement = static nobody does"));
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let text = "[router]\nthreads = 3\nstep_tokens = 100\nprefill_chunk = 50\nhttp = \"127.0.0.1:1\"\n";
    let variables = [("MUSTER_ROUTER_THREADS", "4"), ("MUSTER_ROUTER_HTTP", "127.0.0.1:2"), ("OTHER", "x")];
    let loaded = router(text, &variables, &minimal().text("http", Some("127.0.0.1:3"))).unwrap();
    let settings = &loaded.settings;
    assert_eq!(settings.http.port(), 3);
    assert_eq!(settings.compute.threads.map(|threads| threads.get()), Some(4));
    assert_eq!((settings.step_tokens, settings.max_queue), (100, 1024));
    for line in [
        "http = \"127.0.0.1:3\"  # flag --http",
        "threads = \"4\"  # environment variable MUSTER_ROUTER_THREADS",
        "max_queue = 1024  # default",
        "workers = [\"127.0.0.1:7070\"]  # flag --worker",
    ] {
        assert!(loaded.effective.contains(line), "{line} in {}", loaded.effective);
    }
    assert!(loaded.effective.contains(":3\n"), "the file's line 3 is named: {}", loaded.effective);
}

#[test]
fn the_effective_configuration_is_a_file_that_means_the_same() {
    let flags = minimal()
        .text("kv_memory", Some("1GiB"))
        .text("model_name", Some("a \"b\""))
        .on("insecure_plaintext");
    let first = router("", &[], &flags).unwrap();
    let second = router(&first.effective, &[], &Flags::new()).unwrap();
    assert_eq!(first.settings, second.settings);
    assert_eq!(first.settings.kv_memory, Some(1 << 30));
}

#[test]
fn all_problems_are_reported_at_once_with_line_and_key() {
    let text = "[router]\nhtp = 1\nthreads = 0\nexpert_timeout = \"5\"\ngrpc = 7\n\n[worker]\nshares = \"1/2\"\n\n[cluster]\n";
    let expected = [
        "FILE:10: cluster: unknown key; tables are [router] and [worker]",
        "FILE:5: grpc: must be a string, not integer",
        "FILE:2: htp: unknown key; did you mean http?",
        "FILE:8: shares: unknown key; did you mean share?",
        "FILE:4: expert_timeout: \"5\" is not a time span of 1ms to 24h; write a whole number and a unit, as in 500ms or 30s",
        "FILE:3: threads: \"0\" is neither 1 to 1024 nor auto",
    ];
    assert_eq!(problems(text), expected);
}

#[test]
fn damaged_files_are_named_with_the_line() {
    assert!(problems("[router]\nthreads = \n")[0].starts_with("FILE:2: "));
    assert!(
        problems("[router]\nthreads = 1\nthreads = 2\n")
            .iter()
            .any(|p| p.contains("FILE:3: ") && p.contains("duplicate"))
    );
    assert_eq!(problems("http = \"x\"\n"), ["FILE:1: http: unknown key; it belongs below a line [router]"]);
    assert_eq!(
        problems("router = 3"),
        ["FILE:1: router: is a table: write its settings below a line [router]"]
    );
    assert_eq!(
        problems("[router]\nthreads = 0x10\n"),
        ["FILE:2: threads: must be a decimal integer or a string, not integer"]
    );
    assert_eq!(
        problems("[router]\nworkers = [1]\n"),
        ["FILE:2: workers: must be an array of strings, not array"]
    );
    assert!(problems(&"#".repeat((1 << 20) + 1))[0].contains("is longer than 1048576 bytes"));
    let binary = file("");
    binary.as_file().write_all(&[0xff, 0xfe, 0]).unwrap();
    let environment = Environment::default();
    let flags = minimal();
    for (path, reason) in [
        (binary.path(), "is not UTF-8 (byte 0)"),
        (std::path::Path::new("/"), "is not a regular file"),
        (std::path::Path::new("/does/not/exist"), "cannot be read"),
    ] {
        let sources = Sources { file: Some(path), environment: &environment, flags: &flags };
        let error = RouterSettings::load(&sources).map(|loaded| loaded.settings).unwrap_err();
        assert_eq!(error.problems.len(), 1, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn byte_order_marks_line_ends_and_emptiness_do_not_matter() {
    for text in ["", "\u{feff}[router]\r\nthreads = 2\r\n", "# nothing\n", "[router]\n[worker]\n"] {
        assert!(router(text, &[], &minimal()).is_ok(), "{text:?}: {:?}", router(text, &[], &minimal()).err());
    }
}

#[test]
fn a_worker_that_joins_needs_no_model_and_begins_empty() {
    let load = |flags: &Flags| {
        WorkerSettings::load(&Sources { file: None, environment: &Environment::default(), flags })
    };
    let joins = Flags::new().list("join", &["127.0.0.1:1".to_owned()]);
    let settings = load(&joins).unwrap().settings;
    assert_eq!((&settings.model, settings.share(), settings.memory), (&None, Share::None, None));
    let error = load(&joins.clone().text("share", Some("0/2"))).unwrap_err().to_string();
    assert!(error.contains("needs a --model"), "{error}");
    let settings = load(&joins.text("model", Some("demo")).text("share", Some("0/2"))).unwrap().settings;
    assert!(matches!(settings.share(), Share::Part { .. }));
    assert!(load(&Flags::new()).unwrap_err().to_string().contains("model: is missing"));
    let alone = Flags::new().text("model", Some("demo"));
    assert_eq!(load(&alone).unwrap().settings.share(), Share::All);
    for (key, value, reason) in [
        ("memory", "12", "is not a size"),
        ("speed", "fast", "neither a number nor auto"),
        ("speed", "-1", "out of range"),
        ("speed", "NaN", "out of range"),
        ("domain", "a b", "domain"),
        ("fetch_rate", "0B", "is not a size"),
        ("join", "nowhere", "is not an address"),
        ("advertise", "nowhere", "is not an address"),
    ] {
        let error = load(&alone.clone().text(key, Some(value))).unwrap_err().to_string();
        assert!(error.contains(reason), "{key}: {error}");
    }
    let router = |key, value| router("", &[], &minimal().text(key, Some(value)));
    for (key, value, reason) in [
        ("placement", "maybe", "neither auto nor static"),
        ("replicas", "0", "from 1 to 64"),
        ("fallback", "yes", "neither none nor local"),
    ] {
        let error = router(key, value).unwrap_err().to_string();
        assert!(error.contains(reason), "{key}: {error}");
    }
}

#[test]
fn what_is_missing_is_named_with_every_way_to_give_it() {
    let error = router("", &[], &Flags::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model: is missing; give --model, MUSTER_ROUTER_MODEL, or model in [router]"
    );
}

#[test]
fn leaving_loopback_must_be_asked_for_by_name() {
    let flags = || minimal().text("http", Some("0.0.0.0:8080")).text("grpc", Some("[::]:50051"));
    let error = router("", &[], &flags()).unwrap_err();
    assert_eq!(error.problems.len(), 2);
    assert!(error.to_string().contains("flag --http: http: 0.0.0.0:8080 can be reached from other machines"));
    // A missing TLS and missing keys need separate settings.
    let error = router("", &[], &flags().on("insecure_plaintext")).unwrap_err();
    assert_eq!(error.problems.len(), 2);
    assert!(error.to_string().contains("everybody may ask; give --api-keys"), "{error}");
    let settings =
        router("", &[], &flags().on("insecure_plaintext").on("insecure_no_keys")).unwrap().settings;
    assert_eq!((settings.tls.files(), settings.access()), (None, AccessMode::Open));
    let keys = flags().on("insecure_plaintext").text("api_keys", Some("k"));
    assert!(router("", &[], &keys).unwrap_err().to_string().contains("everybody may join"));
    let http = minimal().text("http", Some("0.0.0.0:8080"));
    let keys = http.on("insecure_plaintext").text("api_keys", Some("k"));
    assert_eq!(router("", &[], &keys).unwrap().settings.access(), AccessMode::Keys("k".into()));
    assert!(router("", &[], &keys.on("insecure_no_keys")).is_err());
    let tls = flags().text("tls_cert", Some("c")).text("tls_key", Some("k")).text("tls_ca", Some("a"));
    assert_eq!(router("", &[], &tls).unwrap().settings.access(), AccessMode::Certificates);
    assert_eq!(router("", &[], &tls.on("insecure_no_keys")).unwrap().settings.access(), AccessMode::Open);
    let error = router("", &[], &minimal().text("tls_cert", Some("c"))).unwrap_err();
    assert_eq!(error.problems.len(), 2, "{error}");
    assert_eq!(router("", &[], &minimal()).unwrap().settings.access(), AccessMode::Open);
    let environment =
        [("MUSTER_ROUTER_INSECURE_PLAINTEXT", "true"), ("MUSTER_ROUTER_INSECURE_NO_KEYS", "true")];
    assert!(router("", &environment, &flags()).is_ok());
    assert!(router("", &[("MUSTER_ROUTER_INSECURE_PLAINTEXT", "yes")], &flags()).is_err());
    let worker = |listen: &str, more: Flags| {
        let flags = more.text("model", Some("demo")).text("listen", Some(listen));
        WorkerSettings::load(&Sources { file: None, environment: &Environment::default(), flags: &flags })
    };
    for local in ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/w.sock"] {
        assert!(worker(local, Flags::new()).is_ok(), "{local}");
    }
    for open in ["0.0.0.0:1", "[::]:1", "example.org:1", "10.0.0.1:1"] {
        assert!(worker(open, Flags::new()).is_err(), "{open}");
        assert!(worker(open, Flags::new().on("insecure_plaintext")).is_ok(), "{open}");
    }
}

/// On a router's gRPC address, keys guard the clients' services and certificates the workers'. An unguarded address
/// needs an explicit setting, and a router with keys never leaves the workers' services open to other machines.
#[test]
fn what_is_guarded_by_nothing_was_asked_for_by_name() {
    for (grpc, is_near) in
        [("127.0.0.1:1", true), ("[::1]:1", true), ("0.0.0.0:1", false), ("10.0.0.5:1", false)]
    {
        for (tls, keys) in [(false, false), (false, true), (true, false), (true, true)] {
            for (plaintext, no_keys) in [(false, false), (false, true), (true, false), (true, true)] {
                let flags = minimal().text("grpc", Some(grpc));
                let flags = if keys { flags.text("api_keys", Some("k")) } else { flags };
                let tls_file = tls.then_some("f");
                let flags =
                    ["tls_cert", "tls_key", "tls_ca"].into_iter().fold(flags, |f, key| f.text(key, tls_file));
                let flags = if plaintext { flags.on("insecure_plaintext") } else { flags };
                let flags = if no_keys { flags.on("insecure_no_keys") } else { flags };
                let case = format!("{grpc} tls {tls} keys {keys} plaintext {plaintext} no keys {no_keys}");
                let outcome = router("", &[], &flags);
                let expected = if keys && no_keys {
                    Some("insecure_no_keys: is given although there are api_keys")
                } else if is_near || tls {
                    None
                } else if !plaintext {
                    Some("there is no TLS")
                } else if keys {
                    Some("API keys guard only what clients ask there")
                } else if !no_keys {
                    Some("everybody may ask")
                } else {
                    None
                };
                match (expected, outcome) {
                    (None, outcome) => assert!(outcome.is_ok(), "{case}: {}", outcome.unwrap_err()),
                    (Some(_), Ok(_)) => panic!("{case} is taken"),
                    (Some(text), Err(error)) => assert!(error.to_string().contains(text), "{case}: {error}"),
                }
            }
        }
    }
}

#[test]
fn workers_come_as_a_list_and_are_checked_one_by_one() {
    let list = "127.0.0.1:1, [::1]:2 ,unix:/run/w.sock";
    let flags = Flags::new().text("model", Some("demo"));
    let settings = router("", &[("MUSTER_ROUTER_WORKERS", list)], &flags).unwrap().settings;
    assert_eq!(settings.workers.len(), 3);
    for bad in ["::1:80", "host", "a b:1", "127.0.0.1:0", "h:1,h:1", ""] {
        let error = router("", &[("MUSTER_ROUTER_WORKERS", bad)], &flags).unwrap_err();
        assert!(error.to_string().contains("workers: "), "{error}");
    }
    let mut many = String::new();
    (0..10_000).for_each(|port| write!(many, "h:{port},").unwrap());
    let error = router("", &[("MUSTER_ROUTER_WORKERS", &many)], &flags).unwrap_err();
    assert!(error.to_string().contains("at most 4096"), "{error}");
}

#[test]
fn the_environment_is_checked_too_but_services_of_kubernetes_are_not_ours() {
    let unknown = router("", &[("MUSTER_ROUTER_HTPP", "x")], &minimal()).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "environment variable MUSTER_ROUTER_HTPP: htpp: unknown key; did you mean http?"
    );
    let services = [("MUSTER_ROUTER_PORT", "tcp://10.0.0.1:80"), ("MUSTER_ROUTER_SERVICE_HOST", "10.0.0.1")];
    assert!(router("", &services, &minimal()).is_ok());
    assert!(router("", &[("MUSTER_WORKER_NONSENSE", "x")], &minimal()).is_ok(), "another role's");
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let flags = minimal().text("step_tokens", Some("8")).text("prefill_chunk", Some("9"));
    assert!(router("", &[], &flags).unwrap_err().to_string().contains("more than step_tokens, which is 8"));
    let flags = minimal().text("http", Some("127.0.0.1:5")).text("grpc", Some("127.0.0.1:5"));
    assert!(router("", &[], &flags).unwrap_err().to_string().contains("the same address as http"));
}

#[test]
fn a_worker_reads_its_own_table() {
    let file =
        file("[worker]\nmodel = \"demo\"\nshare = \"1/2\"\ndrain_timeout = \"2m\"\n[router]\nid = \"r\"\n");
    let sources =
        Sources { file: Some(file.path()), environment: &Environment::default(), flags: &Flags::new() };
    let settings = WorkerSettings::load(&sources).unwrap().settings;
    assert!(matches!(settings.share(), Share::Part { index: 1, .. }));
    assert_eq!(settings.drain_timeout, Duration::from_secs(120));
}

#[test]
fn roles_are_told_how_weights_are_held() {
    assert_eq!(router("", &[], &minimal()).unwrap().settings.compute.expert_dtype, WeightDType::Native);
    let flags = minimal().text("expert_dtype", Some("q8"));
    let environment = [("MUSTER_ROUTER_EXPERT_DTYPE", "q4")];
    assert_eq!(router("", &environment, &minimal()).unwrap().settings.compute.expert_dtype, WeightDType::Q4);
    assert_eq!(router("", &environment, &flags).unwrap().settings.compute.expert_dtype, WeightDType::Q8);
    let trunk = router("", &[("MUSTER_ROUTER_TRUNK_DTYPE", "q8")], &minimal()).unwrap().settings;
    assert_eq!((trunk.compute.expert_dtype, trunk.trunk_dtype), (WeightDType::Native, WeightDType::Q8));
    let refused = router("", &[("MUSTER_ROUTER_EXPERT_DTYPE", "int4")], &minimal()).unwrap_err().to_string();
    assert!(refused.contains("\"int4\" is not a dtype of weights; use native, q8 or q4"), "{refused}");
    let file = file("[worker]\nmodel = \"demo\"\nexpert_dtype = \"q4\"\n");
    let sources =
        Sources { file: Some(file.path()), environment: &Environment::default(), flags: &Flags::new() };
    assert_eq!(WorkerSettings::load(&sources).unwrap().settings.compute.expert_dtype, WeightDType::Q4);
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text in "(\\[(router|worker|x)\\]\n|[a-z_]{1,12} *= *(\"[^\"\n]{0,9}\"|[0-9._x-]{1,9}|\\[\\]|true)\n|.{0,20}\n){0,8}") {
        let _ = router(&text, &[], &minimal());
    }
}

#[test]
fn a_router_to_join_that_is_no_address_is_one_problem() {
    let flags = Flags::new().list("join", &["http://127.0.0.1:50051".to_owned()]);
    let environment = Environment::default();
    let error =
        WorkerSettings::load(&Sources { file: None, environment: &environment, flags: &flags }).unwrap_err();
    let [problem] = error.problems.as_slice() else { panic!("{error}") };
    assert!(problem.to_string().starts_with("flag --join: join: \"http://127.0.0.1:50051\""), "{problem}");
    assert!(problem.message.contains("http://, is left out here"), "{problem}");
}

#[test]
fn what_becomes_of_generation_config_is_one_of_two_words() {
    let set = |mode| router("", &[], &minimal().text("generation_config", Some(mode)));
    let mode = |mode| set(mode).unwrap().settings.generation_config;
    assert_eq!(router("", &[], &minimal()).unwrap().settings.generation_config, GenerationMode::Auto);
    assert_eq!((mode("auto"), mode("ignore")), (GenerationMode::Auto, GenerationMode::Ignore));
    assert!(set("vllm").unwrap_err().to_string().contains("neither auto nor ignore"));
}

#[test]
fn what_a_router_gives_its_template_is_no_requests_to_set() {
    for name in ["messages", "tools", "add_generation_prompt"] {
        let problems =
            problems(&format!("[router]\ntemplate_variables = [\"enable_thinking\", \"{name}\"]\n"));
        assert_eq!(
            problems,
            [format!(
                "FILE:2: template_variables: {name} is what the router itself gives the template; leave it out"
            )]
        );
    }
}

#[test]
fn lists_are_called_as_their_flags_are() {
    let flags = minimal()
        .list("cors_origins", &["https://a.example".to_owned()])
        .list("template_variables", &["x".to_owned()])
        .list("workers", &["127.0.0.1:1".to_owned()]);
    let effective = router("", &[], &flags).unwrap().effective;
    for flag in ["--cors-origin\n", "--template-variable\n", "--worker\n"] {
        assert!(effective.contains(&format!("# flag {flag}")), "{effective}");
    }
}

#[test]
fn a_worker_that_is_told_nothing_is_told_of_both_ways() {
    let (environment, flags) = (Environment::default(), Flags::new());
    let sources = Sources { file: None, environment: &environment, flags: &flags };
    let error = WorkerSettings::load(&sources).map(|loaded| loaded.settings).unwrap_err().to_string();
    assert!(
        error.contains("model: is missing; give --join HOST:PORT") && error.contains("--model"),
        "{error}"
    );
}
