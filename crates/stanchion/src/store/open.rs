//! Finds the store that a URL names.

use std::sync::Arc;

use super::Store;
use crate::error::{Error, ErrorKind, Result};

/// Returns the scheme of a URL if it is certainly a scheme. A URL without one may begin with a user's name.
pub(crate) fn shown_scheme(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once(':')?;
    let is_scheme = scheme.len() <= 32 && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    (is_scheme && (rest.starts_with("//") || !rest.contains('@'))).then_some(scheme)
}

/// Opens the store that a URL names, without a session.
///
/// This is for wrapping the store. [`Locks::open`](crate::Locks::open) lists the URLs, opens a session, and retries.
///
/// ```
/// use stanchion::Locks;
/// use stanchion::store::{self, Observed};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let store = Observed::new(store::open("memory:").await?, |done| println!("{:?}: {:?}", done.operation, done.took));
/// let locks = Locks::with_store(store).await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] if the URL is malformed, [`ErrorKind::Unsupported`] if this build lacks the store, and
/// the errors of the store.
///
/// # Cancel safety
/// A dropped future leaves nothing behind.
pub async fn open(url: &str) -> Result<Arc<dyn Store>> {
    match scheme(url) {
        "memory" if url == "memory:" => Ok(Arc::new(super::Memory::new())),
        "memory" => Err(Error::new(ErrorKind::InvalidArgument, "the memory store's URL is `memory:` and nothing more")),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(Arc::new(super::Sqlite::connect(url).await?)),
        #[cfg(not(feature = "sqlite"))]
        "sqlite" => Err(not_built("sqlite")),
        #[cfg(feature = "redis")]
        redis if is_redis(redis) => Ok(Arc::new(super::Redis::from_url(url)?)),
        #[cfg(not(feature = "redis"))]
        redis if is_redis(redis) => Err(not_built(redis)),
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => Ok(Arc::new(super::Postgres::from_url(url)?)),
        #[cfg(not(feature = "postgres"))]
        known @ ("postgres" | "postgresql") => Err(not_built(known)),
        #[cfg(feature = "firestore")]
        "firestore" => Ok(Arc::new(super::Firestore::from_url(url)?)),
        #[cfg(not(feature = "firestore"))]
        "firestore" => Err(not_built("firestore")),
        "" => {
            let message = format!("a store's URL must begin with a scheme, one of {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
        _ => {
            let urls = shown_scheme(url).map_or("such URLs".to_owned(), |scheme| format!("`{scheme}:` URLs"));
            let message = format!("there is no store for {urls}; the schemes are {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
    }
}

/// Returns whether the scheme is Redis's, including `redis+sentinel` and the like.
fn is_redis(scheme: &str) -> bool {
    matches!(scheme.split('+').next(), Some("redis" | "rediss"))
}

#[cfg(not(all(feature = "sqlite", feature = "redis", feature = "postgres", feature = "firestore")))]
fn not_built(scheme: &str) -> Error {
    let feature = match scheme {
        redis if is_redis(redis) => "redis",
        "postgresql" => "postgres",
        feature => feature,
    };
    let message = format!(
        "this build has no store for `{scheme}:` URLs: build it with the Cargo feature `{feature}`; it has {}",
        stores()
    );
    Error::new(ErrorKind::Unsupported, message)
}

fn stores() -> String {
    let redis = "`redis:` (with `rediss:`, `redis+unix:`, `redis+sentinel:`, `redis+cluster:`)";
    let all = [
        (true, "`memory:`"),
        (cfg!(feature = "sqlite"), "`sqlite:`"),
        (cfg!(feature = "redis"), redis),
        (cfg!(feature = "postgres"), "`postgres:`"),
        (cfg!(feature = "firestore"), "`firestore:`"),
    ];
    let built: Vec<_> = all.into_iter().filter(|(is_built, _)| *is_built).map(|(_, name)| name).collect();
    built.join(", ")
}

fn scheme(url: &str) -> &str {
    url.split_once(':').map_or("", |(scheme, _)| scheme)
}
