//! Chooses the store and opens it.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stanchion::store::{Observed, OperationDone, Postgres, Redis, Sqlite, redacted};
use stanchion::{BootTime, Clock, Key, Locks};

use crate::arguments::Common;
use crate::message::{Failure, Verbosity, quoted};
use crate::output::for_people;
use crate::{environment, exit_code, url_mistake};

/// Maximum time for ending the session in a store that did not answer before.
const CLOSE_AWAY_WITHIN: Duration = Duration::from_millis(100);

/// Maximum time for contact with the store where a key is not waited for, opening included.
pub(crate) const NO_WAIT_WITHIN: Duration = Duration::from_millis(900);

/// Interval between attempts to open the embedded store.
const OPEN_EVERY: Duration = Duration::from_millis(100);

/// Time within which the library reports why a store could not be opened, once its limit has come.
const TOLD_WITHIN: Duration = Duration::from_millis(20);

/// The chosen store. `Debug` does not show the URL: it may hold a password.
#[derive(Clone)]
pub(crate) struct StoreChoice {
    url: String,
    /// Option or variable that names the store, or `None` for the store of a user who named none.
    named_by: Option<&'static str>,
    /// Environment variable that makes an inner `stanchion` choose the same store, unless that would show a password.
    for_children: Option<(&'static str, OsString)>,
    /// The namespace of the keys; empty for none.
    namespace: String,
}

impl std::fmt::Debug for StoreChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreChoice").finish_non_exhaustive()
    }
}

/// An open store.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) locks: Locks,
    embedded: Option<Arc<Sqlite>>,
}

impl Opened {
    /// Returns the descriptor that keeps the session's holds for as long as a process has a copy of it.
    pub(crate) fn session_descriptor(&self) -> Option<OwnedFd> {
        self.embedded.as_ref()?.session_descriptor(self.locks.session()?)
    }
}

/// Returns the store and the namespace of the options, else of the environment, else the embedded store in the user's state
/// folder.
pub(crate) fn resolve(common: &Common) -> Result<StoreChoice, Failure> {
    let namespace = match &common.namespace {
        Some(name) => name.clone(),
        None => std::env::var_os(environment::NAMESPACE).unwrap_or_default().into_string().map_err(|_| {
            Failure::new(exit_code::USAGE, format!("{} is not UTF-8: choose another name", environment::NAMESPACE))
        })?,
    };
    let choice = StoreChoice { namespace, ..resolve_url(common)? };
    // Any name will do: this checks the namespace, before anything is opened.
    choice.key("x")?;
    Ok(choice)
}

fn resolve_url(common: &Common) -> Result<StoreChoice, Failure> {
    if let Some(url) = &common.store {
        if holds_password(url) {
            let message = format!(
                "a password in an argument can be read by every user of this machine: put the URL into the environment \
                 ({}) or into a file (--store-file PATH)",
                environment::STORE
            );
            return Err(Failure::new(exit_code::USAGE, message));
        }
        return choose(url, "--store", "--store");
    }
    if let Some(path) = &common.store_file {
        return from_file(path, "--store-file");
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(url) = variable(environment::STORE) {
        let url = url.into_string().map_err(|_| {
            Failure::new(
                exit_code::USAGE,
                format!("{} is not UTF-8: write other bytes of a URL as %XX", environment::STORE),
            )
        })?;
        return choose(&url, environment::STORE, environment::STORE);
    }
    match variable(environment::STORE_FILE) {
        Some(path) => from_file(Path::new(&path), environment::STORE_FILE),
        None => {
            if let Some(note) = other_users_store().filter(|_| common.verbose) {
                Verbosity::Verbose.note(note);
            }
            Ok(StoreChoice { named_by: None, for_children: None, ..chosen(DEFAULT.to_owned(), "") })
        }
    }
}

/// Returns a note if `sudo` or `doas` made this process another user's, whose default store the caller does not expect.
fn other_users_store() -> Option<String> {
    let caller = ["SUDO_USER", "DOAS_USER"].into_iter().find_map(|name| std::env::var(name).ok())?;
    let user = rustix::process::geteuid().as_raw();
    Some(format!(
        "this is the store of user {user}, not that of user `{}` who called: the two do not exclude each other's \
         commands; only a store with a server does",
        quoted(&caller)
    ))
}

fn from_file(path: &Path, named_by: &'static str) -> Result<StoreChoice, Failure> {
    let shown = quoted(&path.to_string_lossy());
    let failed = |error: std::io::Error| {
        let code = match error.kind() {
            std::io::ErrorKind::PermissionDenied => exit_code::NOT_PERMITTED,
            _ => exit_code::MISCONFIGURED,
        };
        let wanted = "name a file with the store's URL in its first line";
        Failure::new(code, format!("cannot read `{shown}` (of {named_by}): {error}; {wanted}"))
    };
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let state = file.metadata().map_err(failed)?;
    if let Some(why) = insecure(state.uid(), state.mode(), rustix::process::geteuid().as_raw(), &shown) {
        return Err(Failure::new(exit_code::MISCONFIGURED, format!("`{shown}` (of {named_by}) {why}")));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    // Some editors put a mark before the first character.
    let url = text.trim_start_matches('\u{feff}').lines().next().unwrap_or_default().trim();
    let choice = choose(url, &format!("the first line of `{shown}` (of {named_by})"), named_by)?;
    // Absolute, because the command may change its folder.
    let path = std::path::absolute(path).map_err(failed)?;
    Ok(StoreChoice { for_children: Some((environment::STORE_FILE, path.into_os_string())), ..choice })
}

/// Returns why a file that may hold a password is refused. The rules are libpq's: a file of this user must be closed to
/// others, and root may let a group read a file of root's.
fn insecure(owner: u32, mode: u32, user: u32, path: &str) -> Option<String> {
    match owner {
        0 if mode & 0o037 == 0 => None,
        _ if owner == user && mode & 0o077 == 0 => None,
        _ if owner == user => Some(format!("may be used by others, and may hold a password: run `chmod 600 {path}`")),
        0 => Some("may be used by everybody, and may hold a password: use a copy that is yours alone".to_owned()),
        _ => Some(format!(
            "belongs to user {owner}, this process is user {user}: use a copy that is yours alone, or root's"
        )),
    }
}

/// Checks that the text is a URL and names a store that other processes can share, which the library does not require.
/// `place` is where the text stands, for messages.
fn choose(url: &str, place: &str, named_by: &'static str) -> Result<StoreChoice, Failure> {
    if let Some(mistake) = url_mistake::find(url) {
        return Err(Failure::new(exit_code::USAGE, format!("{place} {mistake}")));
    }
    match url.strip_prefix("sqlite:") {
        Some(_) => embedded_url(url, place, std::env::var_os("HOME")).map(|url| chosen(url, named_by)),
        None => Ok(chosen(url.to_owned(), named_by)),
    }
}

fn chosen(url: String, named_by: &'static str) -> StoreChoice {
    let for_children = (!holds_password(&url)).then(|| (environment::STORE, OsString::from(&url)));
    StoreChoice { url, named_by: Some(named_by), for_children, namespace: String::new() }
}

/// Returns the URL with the home folder in place of `~`. Refuses a relative folder: it would be another store in each
/// working directory.
fn embedded_url(url: &str, named_by: &str, home: Option<OsString>) -> Result<String, Failure> {
    let usage = |message: String| Err(Failure::new(exit_code::USAGE, message));
    let folder = url.strip_prefix("sqlite:").unwrap_or_default();
    if folder.is_empty() || folder.starts_with(['/', '?']) {
        return Ok(url.to_owned());
    }
    let below_home = folder.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match below_home {
        Some(rest) => {
            match home.as_ref().and_then(|home| home.to_str()).filter(|home| home.starts_with('/') && *home != "/") {
                Some(home) => Ok(format!("sqlite:{}{rest}", home.replace('%', "%25").replace('?', "%3F"))),
                None => usage(format!(
                    "{named_by} names a folder below `~`, and HOME names no home: write an absolute folder"
                )),
            }
        }
        None => usage(format!(
            "{named_by} names a relative folder, which is another store in each working directory: write \
             sqlite:/ABSOLUTE/FOLDER or sqlite:~/FOLDER"
        )),
    }
}

fn holds_password(url: &str) -> bool {
    let Some((_, rest)) = url.split_once("://") else { return url.contains("password=") };
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let in_address =
        address.rsplit_once('@').is_some_and(|(user, _)| user.split_once(':').is_some_and(|(_, p)| !p.is_empty()));
    in_address
        || query.split('&').any(|option| {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let name = name.to_ascii_lowercase();
            // A URL in the URL.
            let inner = value.replace("%3A", ":").replace("%3a", ":").replace("%2F", "/").replace("%2f", "/");
            holds_password(&inner.replace("%40", "@"))
                || ["password", "passwd", "pass", "pwd", "secret", "token", "auth"]
                    .iter()
                    .any(|word| name.contains(word))
        })
}

/// The user's own folder.
const DEFAULT: &str = "sqlite:";

impl StoreChoice {
    /// Returns the store and the namespace as messages name them, without a password.
    pub(crate) fn shown(&self) -> String {
        let store = match self.folder() {
            Some(Ok(folder)) => quoted(&format!("sqlite:{}", folder.display())),
            _ => quoted(&self.url),
        };
        if self.namespace.is_empty() { store } else { format!("{store}, namespace `{}`", quoted(&self.namespace)) }
    }

    /// Returns the key of this name, or an error if it cannot be one.
    pub(crate) fn key(&self, name: &str) -> Result<Key, Failure> {
        Ok(Key::new(&self.namespace, name)?)
    }

    /// Returns the option or the variable that names the store, unless it is the default store.
    pub(crate) fn named_by(&self) -> Option<&'static str> {
        self.named_by
    }

    /// Returns the environment that makes an inner `stanchion` choose the same store and namespace.
    pub(crate) fn for_children(&self) -> Vec<(&'static str, OsString)> {
        let namespace = (!self.namespace.is_empty()).then(|| (environment::NAMESPACE, self.namespace.clone().into()));
        self.for_children.iter().cloned().chain(namespace).collect()
    }

    /// Returns whether an inner `stanchion` does not get this store, because its URL holds a password.
    pub(crate) fn is_kept_from_children(&self) -> bool {
        self.for_children.is_none() && !self.is_default()
    }

    /// Returns a short text that differs between two stores, and for two URLs of one store. It does not tell a password.
    pub(crate) fn mark(&self) -> String {
        let name = match self.folder() {
            Some(Ok(folder)) => folder.canonicalize().unwrap_or(folder).to_string_lossy().into_owned(),
            _ => redacted(&self.url).into_owned(),
        };
        // FNV-1a, because the hashes of the standard library may change with its version.
        let mix = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        format!("{:08x}", name.bytes().fold(0x811c_9dc5, mix))
    }

    #[cfg(test)]
    pub(crate) fn of_url(url: &str) -> Self {
        chosen(url.to_owned(), "--store")
    }

    /// Returns whether it is the store of a user who named none.
    pub(crate) fn is_default(&self) -> bool {
        self.url == DEFAULT
    }

    /// Returns the folder of the embedded store.
    fn folder(&self) -> Option<stanchion::Result<PathBuf>> {
        self.url.starts_with(DEFAULT).then(|| Sqlite::folder_of_url(&self.url))
    }

    /// Returns whether it is an embedded store whose folder is known.
    pub(crate) fn has_folder(&self) -> bool {
        self.folder().is_some_and(|folder| folder.is_ok())
    }

    /// Refuses a folder that looks like a typing error: of a folder that the user named, the store makes the last part only.
    fn check_parent(&self) -> Result<(), Failure> {
        let Some(folder) = self.folder().filter(|_| !self.is_default()).transpose()? else { return Ok(()) };
        match folder.parent() {
            Some(parent) if !parent.exists() => Err(Failure::new(
                exit_code::MISCONFIGURED,
                format!(
                    "`{}` does not exist: make it first, or correct the store's URL",
                    quoted(&parent.to_string_lossy())
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Returns whether it is the user's own store, and nobody has held a key in it yet.
    pub(crate) fn is_unused(&self) -> bool {
        self.is_default() && matches!(self.folder(), Some(Ok(folder)) if !folder.exists())
    }

    /// Returns the store to look at: looking does not create the folder of the embedded store.
    fn for_looking(&self) -> Result<Self, Failure> {
        match self.check_exists() {
            // Nobody has held a key yet: an empty store gives the same answers.
            Err(_) if self.is_default() && self.has_folder() => Ok(Self { url: "memory:".to_owned(), ..self.clone() }),
            checked => checked.map(|()| self.clone()),
        }
    }

    /// Returns an error if the folder of the embedded store does not exist.
    pub(crate) fn check_exists(&self) -> Result<(), Failure> {
        match self.folder().transpose()? {
            Some(folder) if !folder.exists() => {
                let folder = quoted(&folder.to_string_lossy());
                let message = format!("no store in `{folder}`: the first `stanchion run` makes it");
                Err(Failure::new(exit_code::MISCONFIGURED, message))
            }
            _ => Ok(()),
        }
    }

    /// Returns the product and the version of the store's server, or `None` for a store that does not report them.
    pub(crate) async fn server(&self) -> stanchion::Result<Option<String>> {
        match self.url.split_once(':').map(|(scheme, _)| scheme) {
            Some("sqlite") => Ok(Some(format!("SQLite {}", Sqlite::sqlite_version()))),
            Some(scheme) if scheme.starts_with("redis") => Redis::from_url(&self.url)?.server().await.map(Some),
            Some("postgres" | "postgresql") => Postgres::from_url(&self.url)?.server().await.map(Some),
            _ => Ok(None),
        }
    }

    /// Opens the store another time, with a session of its own, and reports each operation of it.
    pub(crate) async fn open_observed(
        &self,
        owner: &str,
        limit: Duration,
        report: impl Fn(&OperationDone<'_>) + Send + Sync + 'static,
    ) -> stanchion::Result<Locks> {
        let store = Observed::new(stanchion::store::open(&self.url).await?, report);
        Locks::builder_with_store(store).owner(owner).open_within(limit).open().await
    }

    /// Opens the store within `limit`, or within the library's default.
    pub(crate) async fn open(
        &self,
        owner: Option<&str>,
        ttl: Option<Duration>,
        limit: Option<Duration>,
    ) -> Result<Opened, Failure> {
        match limit {
            Some(limit) => {
                within(limit, self.open_with(owner, ttl, Some(limit))).await.unwrap_or_else(|| Err(silent(limit)))
            }
            None => self.open_with(owner, ttl, None).await,
        }
    }

    async fn open_with(
        &self,
        owner: Option<&str>,
        ttl: Option<Duration>,
        limit: Option<Duration>,
    ) -> Result<Opened, Failure> {
        self.check_parent()?;
        let started = Clock::system().now();
        let (mut builder, embedded) = if self.url.starts_with("sqlite:") {
            // The handle is kept for its descriptors.
            let store = Arc::new(self.embedded(started.after(limit.unwrap_or_default())).await?);
            (Locks::builder_with_store(store.clone()), Some(store))
        } else {
            (Locks::builder(&self.url), None)
        };
        builder = builder.namespace(&self.namespace);
        if let Some(owner) = owner {
            builder = builder.owner(owner);
        }
        if let Some(ttl) = ttl {
            builder = builder.session_ttl(ttl);
        }
        if let Some(limit) = limit {
            // A little less than the whole: the library's error says why the store is away.
            let left = limit.saturating_sub(Clock::system().now().since(started));
            builder = builder.open_within(left.saturating_sub(TOLD_WITHIN));
        }
        Ok(Opened { locks: builder.open().await?, embedded })
    }

    /// Opens the embedded store, again after transient faults until `give_up_at`.
    async fn embedded(&self, give_up_at: BootTime) -> stanchion::Result<Sqlite> {
        let clock = Clock::system();
        loop {
            let fault = match Sqlite::connect(&self.url).await {
                Err(fault) if fault.is_transient() => fault,
                done => return done,
            };
            let left = give_up_at.since(clock.now()).saturating_sub(TOLD_WITHIN);
            if left.is_zero() {
                return Err(fault);
            }
            pause(left.min(OPEN_EVERY)).await;
        }
    }

    /// Returns the PostgreSQL store, for its schema.
    pub(crate) fn database(&self) -> Result<Postgres, Failure> {
        if !self.url.starts_with("postgres") {
            let message = "only PostgreSQL needs a schema: give a `postgres://` URL";
            return Err(Failure::new(exit_code::USAGE, message));
        }
        Ok(Postgres::from_url(&self.url)?)
    }

    /// Runs async work in a runtime of its own.
    pub(crate) fn run<T>(&self, work: impl AsyncFnOnce() -> stanchion::Result<T>) -> Result<T, Failure> {
        let runtime = runtime()?;
        let done = runtime.block_on(work());
        runtime.shutdown_background();
        Ok(done?)
    }

    /// Opens the store, queries it, and closes it.
    pub(crate) fn ask<T>(&self, question: impl AsyncFnOnce(&Locks) -> stanchion::Result<T>) -> Result<T, Failure> {
        self.ask_within(None, question)
    }

    /// The same, with a limit for opening the store.
    pub(crate) fn ask_within<T>(
        &self,
        limit: Option<Duration>,
        question: impl AsyncFnOnce(&Locks) -> stanchion::Result<T>,
    ) -> Result<T, Failure> {
        let store = self.for_looking()?;
        let runtime = runtime()?;
        let answer = runtime.block_on(async {
            let opened = store.open(None, None, limit).await?;
            let answer = question(&opened.locks).await;
            close(&opened, answer.as_ref().is_err_and(stanchion::Error::is_transient)).await;
            Ok(answer?)
        });
        // A name that is still being resolved is not waited for.
        runtime.shutdown_background();
        answer
    }
}

/// Ends the session. If the store did not answer before, the tool does not wait for it: the session ends by itself.
pub(crate) async fn close(opened: &Opened, is_store_away: bool) {
    if is_store_away {
        let _ = within(CLOSE_AWAY_WITHIN, opened.locks.close()).await; // the session then expires by itself
    } else {
        let _ = opened.locks.close().await; // the session then expires by itself
    }
}

/// Returns the outcome, or `None` after `limit`.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

#[allow(clippy::disallowed_methods, reason = "a pause between looks, not a deadline of the protocol")]
pub(crate) async fn pause(span: Duration) {
    tokio::time::sleep(span).await;
}

/// Returns the failure of a store that did not answer.
pub(crate) fn silent(limit: Duration) -> Failure {
    Failure::new(exit_code::UNAVAILABLE, format!("the store did not answer within {}", for_people(limit)))
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(exit_code::INTERNAL, format!("the system refused a runtime: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insecure_store_files_are_refused() {
        let why = |owner, mode| insecure(owner, mode, 1000, "f");
        for (owner, mode) in [(1000, 0o100_600), (1000, 0o100_400), (0, 0o100_600), (0, 0o100_640), (1000, 0o010_600)] {
            assert_eq!(why(owner, mode), None, "{owner} {mode:o}");
        }
        for mode in [0o640, 0o604, 0o620, 0o602, 0o666] {
            assert!(why(1000, mode).unwrap().contains("chmod 600 f"), "{mode:o}");
        }
        for (owner, mode) in [(1001, 0o600), (0, 0o644), (0, 0o660)] {
            assert!(!why(owner, mode).unwrap().contains("chmod"), "{owner} {mode:o}");
        }
    }

    #[test]
    fn passwords_in_urls_are_recognised() {
        for url in [
            "redis://:p@h",
            "redis://u:p@h:1/0",
            "postgres://u:a@b@h/db",
            "postgres://h/db?user=u&password=p",
            "redis://h?auth=x",
            "postgres://h/db?listen=postgres%3A%2F%2Fu:p%40h%2Fdb",
        ] {
            assert!(holds_password(url), "{url}");
        }
        for url in ["redis://h:6379/0", "redis://u@h", "postgres://u:@h/db", "sqlite:/a:b@c", "redis://h?timeout=5"] {
            assert!(!holds_password(url), "{url}");
        }
    }
}
