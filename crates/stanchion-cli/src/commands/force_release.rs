//! `force-release`: ends the hold of another process.

use stanchion::Fence;
use stanchion::store::ForceReleaseOutcome;

use crate::arguments::ForceRelease;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::store::StoreChoice;

pub(super) fn execute(hold: &ForceRelease, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    super::check_key(&hold.key)?;
    let fence = Fence::new(hold.fence);
    let outcome = store.ask(async |locks| locks.force_release(hold.key.as_str(), fence, hold.reason.as_str()).await)?;
    let key = quoted_key(&hold.key);
    match outcome {
        ForceReleaseOutcome::Released => {
            verbosity.note(format_args!("the hold of key `{key}` with fence {} was ended", hold.fence));
            Ok(exit_code::OK)
        }
        ForceReleaseOutcome::NoSuchHold { live } => {
            let now = match live.as_slice() {
                [] => "nobody holds it now".to_owned(),
                live => {
                    let fences: Vec<_> = live.iter().map(|fence| fence.get().to_string()).collect();
                    format!("it is held now with fence {}", fences.join(", "))
                }
            };
            verbosity
                .problem(format_args!("no hold of key `{key}` has fence {}; {now}; nothing was changed", hold.fence));
            Ok(exit_code::NO_SUCH_HOLD)
        }
    }
}
