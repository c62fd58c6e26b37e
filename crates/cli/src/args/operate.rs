//! Subcommands for operators: `certs`, `keys`, `drain`, `probe`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use muster_admin::client::DEFAULT_ADMIN;
use muster_config::parse_duration;

#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make an authority, and a certificate of it for each role: router, worker, client.
    Init(CertsInitArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Writes ca.crt and ca.key, and in router/, worker/ and client/ each tls.crt, tls.key and ca.crt. Every router \
                        and worker takes its directory's three files; keep ca.key to yourself. Run again, it renews what ends \
                        within 30 days and leaves the rest alone.\n\n\
                        Example:\n  muster certs init certs --name muster.example.org --name 10.0.0.5\n  \
                        muster router --grpc 10.0.0.5:50051 --tls-cert certs/router/tls.crt --tls-key certs/router/tls.key \
                        --tls-ca certs/router/ca.crt ..."
)]
pub(crate) struct CertsInitArgs {
    /// Directory for the certificates.
    #[arg(
        value_name = "DIR",
        required_unless_present = "kubernetes_secrets",
        conflicts_with = "kubernetes_secrets"
    )]
    pub(crate) dir: Option<PathBuf>,
    /// Write Kubernetes Secrets instead: PREFIX-ca, PREFIX-router, PREFIX-worker, PREFIX-client.
    #[arg(long, value_name = "PREFIX")]
    pub(crate) kubernetes_secrets: Option<String>,
    /// Namespace of the Secrets [default: this pod's, or the current context's].
    #[arg(long, value_name = "NAME", requires = "kubernetes_secrets")]
    pub(crate) namespace: Option<String>,
    /// The cluster's name in certificates.
    #[arg(long, value_name = "NAME", default_value = "muster")]
    pub(crate) trust_domain: String,
    /// A DNS name or IP address by which clients reach the routers; may be given several times. localhost, 127.0.0.1
    /// and ::1 are always there.
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// How many days certificates are good.
    #[arg(long, value_name = "N", default_value = "365", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key: it is printed on standard output once, and its line for --api-keys is added to a file.
    New(KeysNewArgs),
    /// Print the line for --api-keys of a key that is read from standard input.
    Hash(KeysHashArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  muster keys new alice --file api-keys\n\nTake a line out of the file to revoke its key."
)]
pub(crate) struct KeysNewArgs {
    /// Name of the key's owner.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The file to add its line to; without, the line is printed on standard error.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct KeysHashArgs {
    /// Name of the key's owner.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// The --admin address of the process.
    #[arg(long, value_name = "URL", default_value = DEFAULT_ADMIN)]
    pub(crate) admin: String,
    /// How long to wait at most.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 when it is ready, 1 when it is not; standard output says why.")]
pub(crate) struct ProbeArgs {
    /// The --admin address of the process.
    #[arg(long, value_name = "URL", default_value = DEFAULT_ADMIN)]
    pub(crate) admin: String,
    /// How long to wait for an answer.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}
