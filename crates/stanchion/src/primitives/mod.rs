//! What is made of locks: several at once, one run for all, leaders.

mod election;
mod many;
mod once;
mod runs;
mod status;

pub use self::election::{Election, Leader, Leadership, Observation};
pub use self::many::{Guards, LockAllRequest, Wanted};
pub use self::once::{OnceRequest, Outcome, Turn};
pub use self::runs::Run;
pub use self::status::OwnerStatus;

pub(crate) use self::runs::last_run;
pub(crate) use self::status::status;
