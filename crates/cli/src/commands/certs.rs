//! `muster certs init`: a private certificate authority, and a certificate for each role.
//!
//! A repeated run replaces only certificates that end soon, have other names, or are of another authority.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use muster_discovery::{Api, secrets};
use muster_identity::{Authority, Issued, Role, is_ending};

use crate::args::{CertsCommand, CertsInitArgs};
use crate::failure::Failure;
use crate::out;

/// Remaining time below which a certificate is renewed.
const SOON: Duration = Duration::from_secs(30 * 86_400);
/// Names of a router for clients on the same host or behind a forwarded port.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

const CERT: &str = "tls.crt";
const KEY: &str = "tls.key";
const CA: &str = "ca.crt";

type Files = BTreeMap<&'static str, Vec<u8>>;

/// Storage of certificates: a set of files for the authority, and one for each role.
trait Store {
    /// Files of a set; `None` when one of `names` is missing.
    async fn read(&self, set: &str, names: &[&'static str]) -> Result<Option<Files>, Failure>;
    async fn write(&self, set: &str, files: &Files) -> Result<(), Failure>;
    /// Name of a set in messages.
    fn name(&self, set: &str) -> String;
}

pub(crate) async fn run(command: &CertsCommand) -> Result<(), Failure> {
    let CertsCommand::Init(args) = command;
    match &args.dir {
        Some(directory) => init(args, &Directory(directory.clone())).await,
        None => {
            let api = Api::infer();
            let namespace = match &args.namespace {
                Some(namespace) => namespace.clone(),
                None => api.namespace().await.map_err(Failure::runtime)?,
            };
            let prefix = args.kubernetes_secrets.clone().unwrap_or_default();
            init(args, &Secrets { api, namespace, prefix }).await
        }
    }
}

async fn init(args: &CertsInitArgs, store: &impl Store) -> Result<(), Failure> {
    let authority = match store.read("ca", &[CERT, KEY]).await? {
        Some(files) => {
            let issued = Issued { cert: text(&files, CERT)?, key: text(&files, KEY)? };
            Authority::again(&args.trust_domain, issued).map_err(Failure::input)?
        }
        None => {
            let authority = Authority::new(&args.trust_domain).map_err(Failure::input)?;
            store.write("ca", &files(authority.issued(), None)).await?;
            out::note(&format!("{}: a new authority", store.name("ca")));
            authority
        }
    };
    let ca = &authority.issued().cert;
    let mut names: Vec<String> = args.names.clone();
    names.extend(LOCAL_NAMES.map(str::to_owned));
    let until = SystemTime::now() + Duration::from_secs(u64::from(args.days) * 86_400);
    for role in Role::ALL {
        let set = role.as_str();
        let names = if role == Role::Router { &names[..] } else { &[] };
        if let Some(files) = store.read(set, &[CERT, KEY, CA]).await?
            && is_good(&files, ca, names)
        {
            out::note(&format!("{}: good, left alone", store.name(set)));
            continue;
        }
        let issued = authority.issue(role, names, until).map_err(Failure::input)?;
        store.write(set, &files(&issued, Some(ca))).await?;
        out::note(&format!("{}: a certificate for {} days", store.name(set), args.days));
    }
    Ok(())
}

/// Whether a certificate lasts long enough, is of this authority and has these names.
fn is_good(files: &Files, ca: &str, names: &[String]) -> bool {
    let cert = files.get(CERT).map_or(&[][..], Vec::as_slice);
    let same = files.get(CA).is_some_and(|theirs| theirs == ca.as_bytes());
    let lasts = is_ending(cert, ca.as_bytes(), SOON).is_ok_and(|ends| !ends);
    same && lasts && muster_identity::has_names(cert, names)
}

fn files(issued: &Issued, ca: Option<&str>) -> Files {
    let mut files =
        Files::from([(CERT, issued.cert.clone().into_bytes()), (KEY, issued.key.clone().into_bytes())]);
    if let Some(ca) = ca {
        files.insert(CA, ca.as_bytes().to_vec());
    }
    files
}

fn text(files: &Files, name: &str) -> Result<String, Failure> {
    let bytes = files.get(name).cloned().unwrap_or_default();
    String::from_utf8(bytes).map_err(|_| Failure::input(format!("the authority's {name} is not PEM")))
}

/// A directory: the authority's files at the top, each role's in a subdirectory.
struct Directory(PathBuf);

impl Directory {
    fn path(&self, set: &str, name: &str) -> PathBuf {
        match (set, name) {
            ("ca", CERT) => self.0.join("ca.crt"),
            ("ca", _) => self.0.join("ca.key"),
            (role, name) => self.0.join(role).join(name),
        }
    }
}

impl Store for Directory {
    async fn read(&self, set: &str, names: &[&'static str]) -> Result<Option<Files>, Failure> {
        let mut files = Files::new();
        for &name in names {
            let path = self.path(set, name);
            match std::fs::read(&path) {
                Ok(content) => drop(files.insert(name, content)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Failure::input(format!("{}: {error}", path.display()))),
            }
        }
        Ok(Some(files))
    }

    async fn write(&self, set: &str, files: &Files) -> Result<(), Failure> {
        for (name, content) in files {
            let path = self.path(set, name);
            write(&path, content, *name == KEY)
                .map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
        }
        Ok(())
    }

    fn name(&self, set: &str) -> String {
        self.path(set, CERT).parent().unwrap_or(&self.0).display().to_string()
    }
}

/// Kubernetes Secrets, one for each set.
struct Secrets {
    api: Api,
    namespace: String,
    prefix: String,
}

impl Secrets {
    fn secret(&self, set: &str) -> String {
        format!("{}-{set}", self.prefix)
    }
}

impl Store for Secrets {
    async fn read(&self, set: &str, names: &[&'static str]) -> Result<Option<Files>, Failure> {
        let found = secrets::read(&self.api, Some(&self.namespace), &self.secret(set))
            .await
            .map_err(Failure::runtime)?;
        let Some(mut found) = found else { return Ok(None) };
        Ok(names.iter().map(|&name| Some((name, found.remove(name)?))).collect())
    }

    async fn write(&self, set: &str, files: &Files) -> Result<(), Failure> {
        let entries = files.iter().map(|(&name, content)| (name.to_owned(), content.clone())).collect();
        secrets::write(&self.api, Some(&self.namespace), &self.secret(set), &entries)
            .await
            .map_err(Failure::runtime)
    }

    fn name(&self, set: &str) -> String {
        format!("secret {}/{}", self.namespace, self.secret(set))
    }
}

/// Replaces a file atomically: readers see the old content or the new one.
fn write(path: &Path, content: &[u8], is_secret: bool) -> io::Result<()> {
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let beside = path.with_extension("new");
    let mode = if is_secret { 0o600 } else { 0o644 };
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(beside, path)
}
