//! Builds higher primitives from locks: several keys at once, one run for all callers, elections.

mod election;
mod many;
mod once;
mod runs;
mod status;

pub use self::election::{Election, Leader, LeaderStream, Leadership};
pub use self::many::{Guards, KeyRequest, LockAllRequest};
pub use self::once::{OnceGuard, OnceOutcome, OnceRequest};
pub use self::runs::{RunListing, RunRecord};
pub use self::status::OwnerStatus;

pub(crate) use self::runs::{forget_run, last_run, list_runs};
pub(crate) use self::status::status;
