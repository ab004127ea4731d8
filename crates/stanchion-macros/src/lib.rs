//! The attribute of stanchion. Its documentation for users is at `stanchion::locked`, which re-exports it.

mod duration;
mod expand;
mod key;
mod options;

use proc_macro::TokenStream;

/// Runs an async function or method under a lock whose key is made of its arguments.
///
/// The body runs as in `LockRequest::run`: it is dropped at its next await when the lock is lost, and the lock is released
/// when it returns, or when the caller drops the future. What it returns is returned, an error of its own too.
///
/// The function is async and returns a `Result<T, E>` (or a type whose name ends so) with `E: From<stanchion::Error>`:
/// a lock that was not obtained or that was lost is an `Err`.
///
/// | option | meaning |
/// |---|---|
/// | `key = "file:{id}"` | required. `{id}`, `{self.name}`, `{request.id}`, `{pair.0}` name arguments and their fields, shown by `Display`; `{{` and `}}` are braces. Or an expression: `key = key_of(&request)` |
/// | `locks = EXPRESSION` | the handle: a `Locks`, or what derefs to one. Default: the argument `locks` if there is one, else `self.locks` |
/// | `wait = "5s"` | waits no longer, then `ErrorKind::Timeout`. Default: no limit |
/// | `try` | does not wait: `ErrorKind::Busy` if another has the key |
/// | `cooldown = "5m"` | the key stays closed for so long after the release |
/// | `max_hold = "1m"` | the lock is lost after this time |
/// | `ttl = "1m"` | a fixed term, whatever becomes of the process |
/// | `read`, `write` | shared with other readers; alone, which is the default |
/// | `guard = NAME` | the body has the `&Guard` under this name: its fence, `check`, `heartbeat`, `set_cooldown` |
///
/// Different arguments must make different keys: with `"{a}:{b}"`, a `:` inside of one of them would not.
///
/// Durations are read when the program is compiled: a number with a unit (`500ms`, `30s`, `5m`, `2h`, `1d`), several
/// (`1h 30m`), or seconds (`30`, `1.5`). Instead of a text, an expression of type `Duration` is evaluated at each call.
///
/// Other attributes of the function keep working, `#[tracing::instrument]` among them. Methods in an impl of
/// `#[async_trait]` are no async functions any more when this attribute sees them: put it on a method of their own.
#[proc_macro_attribute]
pub fn locked(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let untouched = proc_macro2::TokenStream::from(item.clone());
    expand::locked(arguments.into(), item.into())
        // The function stays, so that the mistake is the only error.
        .unwrap_or_else(|mistake| {
            let mistake = mistake.into_compile_error();
            quote::quote! { #mistake #untouched }
        })
        .into()
}
