//! Settings of both routers and workers: computing, certificates and logs.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use muster_identity::TlsFiles;
use muster_telemetry::LogFormat;
use muster_types::{Compute, WeightDType};

use crate::declare::settings;
use crate::group::DefaultTo::{Nothing, Value, Words};
use crate::group::{ADDR, DTYPE, FILE, Form, MODE, NUMBER_OR_WORD, SWITCH};
use crate::layers::Reader;
use crate::value::{self, parse_compute, parse_socket, parse_weight_dtype, parsed};

/// Heading of the settings that every command takes.
pub const LOGGING: &str = "Logging";

settings! {
    /// Settings of computing and of the model's files.
    pub struct ComputeSettings, ComputeRead {
        /// What activations are rounded to: f32, bf16, bf16-pairs, or auto, which is the dtype of the model's weights.
        ///
        /// See [numerics](numerics.md).
        compute: Option<Compute> = required(parse_compute), MODE, Value("auto");

        /// How experts are held: native, or in groups of 32 weights as q8 or q4.
        ///
        /// A router demands it of its workers.
        expert_dtype: WeightDType = required(parse_weight_dtype), DTYPE, Value("native");

        /// Compute threads; auto is all cores.
        threads: Option<NonZeroUsize> = required(value::threads), NUMBER_OR_WORD, Value("auto");

        /// Let files of the model's directory be links to anywhere on this machine.
        ///
        /// See [below](#a-models-directory).
        allow_links: bool = required(value::switch), SWITCH, Value("false");
    }
}

settings! {
    /// Settings of certificates and of the admin interface.
    pub struct TlsSettings, TlsRead {
        /// This process's certificate, PEM, with its role as URI name; read again when it changes. `muster certs init`
        /// makes one.
        ///
        /// The three files are given together or not at all ([security](security.md)).
        tls_cert: Option<PathBuf> = optional(value::path), FILE, Nothing;

        /// Its private key, PEM.
        tls_key: Option<PathBuf> = optional(value::path), FILE, Nothing;

        /// The cluster's authority, PEM: other processes must have certificates of it.
        tls_ca: Option<PathBuf> = optional(value::path), FILE, Nothing;

        /// Allow addresses that other machines can reach, without TLS.
        ///
        /// For a router's `grpc` not together with `api_keys`, which do not guard what workers ask
        /// ([security](security.md)).
        insecure_plaintext: bool = required(value::switch), SWITCH, Value("false");

        /// Where /healthz, /readyz and /metrics are answered in plain HTTP, for a kubelet and a collector, and POST
        /// /drain for this host.
        admin: Option<SocketAddr> = optional(parse_socket), ADDR, Words("nowhere");
    }
}

settings! {
    /// Settings of logs.
    pub struct LogSettings, LogRead {
        /// What to log, as `level` or `target=level`, separated by commas.
        ///
        /// Logs go to standard error.
        log: String = required(value::text), Form::text("FILTER"), Value("info");

        /// Format of logs: human or json.
        log_format: LogFormat = required(parsed), Form::text("FORMAT"), Value("human");
    }
}

impl TlsSettings {
    /// The certificates; `None` speaks plaintext.
    #[must_use]
    pub fn files(&self) -> Option<TlsFiles> {
        let Self { tls_cert: Some(cert), tls_key: Some(key), tls_ca: Some(ca), .. } = self else {
            return None;
        };
        Some(TlsFiles { cert: cert.clone(), key: key.clone(), ca: ca.clone() })
    }
}

impl TlsRead {
    /// Checks that all three files are given or none.
    pub(crate) fn check(&self, reader: &mut Reader) {
        let files = self.each();
        for (key, _) in files.iter().filter(|(_, is_there)| !is_there) {
            if files.iter().any(|(_, is_there)| *is_there) {
                reader.problem(key, "is missing; TLS takes tls_cert, tls_key and tls_ca".to_owned());
            }
        }
    }

    pub(crate) fn has_files(&self) -> bool {
        self.each().iter().all(|(_, is_there)| *is_there)
    }

    fn each(&self) -> [(&'static str, bool); 3] {
        [("tls_cert", &self.tls_cert), ("tls_key", &self.tls_key), ("tls_ca", &self.tls_ca)]
            .map(|(key, file)| (key, matches!(file, Some(Some(_)))))
    }
}

/// Error for an address that other machines can reach, without TLS.
pub(crate) fn off_loopback(address: &str) -> String {
    format!(
        "{address} can be reached from other machines and there is no TLS; give --tls-cert, --tls-key and --tls-ca \
         (`muster certs init` makes them), listen on a loopback address, or ask for plaintext by name with \
         --insecure-plaintext"
    )
}
