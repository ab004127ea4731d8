//! The attribute macro of stanchion. Users find its documentation at `stanchion::locked`, which re-exports it.

mod duration;
mod expand;
mod key;
mod options;

use proc_macro::TokenStream;

/// Runs an async function or method under a lock whose key is made from its arguments.
///
/// The function must be async and return a `Result<T, E>` (or a type whose name ends in `Result`) with `E:
/// From<stanchion::Error>`. If the lock is not granted, or is lost, the function returns an `Err`.
///
/// The body runs as in `LockRequest::run`: if the lock is lost, the body is dropped at its next await. The lock is
/// released when the body returns, or when the caller drops the future. The function returns the body's value, an error
/// of the body included.
///
/// | option | meaning |
/// |---|---|
/// | `key = "file:{id}"` | Required. `{id}`, `{self.name}`, `{request.id}`, `{pair.0}` insert arguments and their fields with `Display`; `{{` and `}}` are braces. Or an expression: `key = key_of(&request)` |
/// | `locks = EXPRESSION` | The handle: a `Locks`, or something that dereferences to one. Default: the argument `locks` if there is one, otherwise `self.locks` |
/// | `wait = "5s"` | Limits the wait; then the function fails with `ErrorKind::Timeout`. Default: no limit |
/// | `try` | Does not wait: the function fails with `ErrorKind::Busy` if the key is not free |
/// | `cooldown = "5m"` | Keeps the key closed for this long after the release |
/// | `max_hold = "1m"` | The lock is lost after this time |
/// | `ttl = "1m"` | Gives the lock a fixed lifetime, which does not depend on the process |
/// | `linger = "1s"` | Keeps the key in this process after the release: see `LockRequest::linger` |
/// | `read`, `write` | Shared with other readers, or exclusive, which is the default |
/// | `guard = NAME` | Gives the body the `&Guard` under this name: its fence, `check`, `heartbeat`, `set_cooldown` |
///
/// Different arguments must make different keys. With `"{a}:{b}"`, they do not if an argument can contain a `:`.
///
/// The compiler reads durations: a number with a unit (`500ms`, `30s`, `5m`, `2h`, `1d`), several of them (`1h 30m`),
/// or seconds (`30`, `1.5`). An expression of type `Duration` instead of a text is evaluated at each call.
///
/// Other attributes of the function keep working, such as `#[tracing::instrument]`. In an impl of `#[async_trait]`,
/// methods are no longer async functions when this attribute sees them: lock in a separate method that the trait's
/// method calls.
#[proc_macro_attribute]
pub fn locked(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let untouched = proc_macro2::TokenStream::from(item.clone());
    expand::locked(arguments.into(), item.into())
        // The original function stays, so that the compiler does not also report it as missing.
        .unwrap_or_else(|mistake| {
            let mistake = mistake.into_compile_error();
            quote::quote! { #mistake #untouched }
        })
        .into()
}
