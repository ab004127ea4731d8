//! Defines the mutants, each of which breaks one rule.

use crate::config::{BASE, Config};
use crate::runs::by_name;

/// A rule that a mutant breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// A session's validity starts at the response of a renewal and not at its request.
    ValidityFromReply,
    /// `release` releases any hold without comparing its token.
    ReleaseWithoutToken,
    /// `extend` creates a hold that does not exist.
    ExtendCreates,
    /// Expiry removes any hold without comparing its fence.
    ExpiryWithoutCompare,
    /// Fences come from a counter in the record, without the clock.
    PlainCounter,
    /// The resource accepts every write.
    ResourceUnfenced,
    /// A repeated `acquire` has a fresh token.
    FreshToken,
    /// The client regards the first response to `release` or `abandon` as final.
    FirstReleaseIsFinal,
    /// The client accepts a push for a call that it is releasing.
    PushAfterRelease,
    /// A waiter relies on pushes and never polls.
    NeverPolls,
    /// A fixed lifetime starts in full at the request that was answered, even if the request was a repeated one.
    LifetimeFromRequest,
    /// A fixed lifetime starts at the last request even if an earlier one was answered.
    LifetimeFromLastRequest,
    /// A fixed lifetime starts at the push.
    LifetimeFromPush,
    /// The client accepts a renewal's response after its local deadline.
    LateRenewal,
    /// `abandon` removes only a waiter and no hold.
    AbandonDequeuesOnly,
    /// The store grants to the head of the queue without removing it from the queue.
    HeadNotPopped,
    /// A force-release removes any hold without comparing its fence.
    ForceReleaseWithoutCompare,
    /// The store revives an expired session at a renewal.
    Revive,
    /// The store revives an expired session, and the client accepts it.
    ReviveAndTrust,
    /// `adopt` does not compare the token.
    AdoptWithoutCompare,
    /// `poll` enters a token that the store does not have.
    PollCreates,
    /// `acquire` ignores `not_after`.
    NoNotAfter,
    /// `adopt` ignores `not_after`.
    AdoptNoNotAfter,
    /// A hold stays valid after its session is over.
    IgnoresSession,
    /// The store treats a repeated `acquire` as a new request.
    NotIdempotent,
    /// Holds of an expired session never expire.
    NoExpiry,
    /// A force-release is reported by push only.
    ForceReleaseNotReported,
    /// The store may enter a force-released token again.
    ForceReleasedReenters,
    /// A separate operation records the force-release in the session, and may be late.
    ForceReleaseInTwoOperations,
    /// One response counts for all acquires of its token.
    AnswersPerToken,
    /// A response counts although it arrived after the release was sent.
    AnswersAfterRelease,
    /// The store loses its records and returns within one unit of its clock.
    LossInNoTime,
    /// The store makes more grants than its clock has units.
    CoarseClock,
    /// A holder is expected to learn of a force-release after its session has expired. This is a wish and no rule of
    /// the protocol.
    ReportAfterExpiry,
    /// An extended lifetime starts at the response.
    ExtendFromReply,
    /// A shorter lifetime takes effect only at the response.
    ShorterFromReply,
    /// The client forgets an unanswered extension when a later one is answered.
    ExtendForgets,
    /// The store does not repeat grants to holders when a waiter polls.
    GrantNotRepeated,
    /// The client does not release a repeated grant that none of its calls has.
    UnknownGrantIgnored,
    /// The client releases a repeated grant although the hold is detached or in its grace.
    DetachedIsReleased,
    /// A session's validity starts again at a repeated request to open it.
    OpenCountsAgain,
    /// A repeated request to open a session revives it after it has expired.
    OpenRevives,
    /// A request considers only its own capacity.
    OwnLimitCounts,
    /// A request considers only the capacities of the holds, if there are any.
    HeldLimitCounts,
    /// A request considers only the capacity of the oldest hold, if there is one.
    OldestLimitCounts,
    /// A request that fits overtakes the queue.
    QueuePassed,
    /// The store grants to the first waiter that fits, even if it is not the head of the queue.
    QueueSearched,

    // The rules of holds that linger.
    /// A grant reserves fences ahead of the store's clock, and the holder uses as many as time has passed.
    ElapsedBlock,
    /// A grant reserves fences ahead of the store's clock, and the holder uses all of them.
    WholeBlock,
    /// A grant reserves fences behind the store's clock.
    PastBlock,
    /// `linger` does not raise the newest fence of the key.
    CounterNotRaised,
    /// A force-release counts from the hold's fence and not from the newest fence of the key.
    ForceForgetsCounter,
    /// A local grant has the fence of the grant before.
    SameFence,
    /// An adopted hold that lingered keeps its fence.
    AdoptKeepsFence,
    /// `linger` releases the hold if a request waits for the key.
    LingerReleases,
    /// `linger` does not report that a request waits for the key.
    WantedNotReported,
    /// Local grants go on until there is a recall.
    NoLease,
    /// The lease starts at the response to `linger` and not at its request.
    LeaseFromReply,
    /// Local grants do not need a valid session.
    LocalWithoutSession,
    /// A recall of a hold in use is forgotten.
    RecallForgotten,
    /// A recall releases a hold in use.
    RecallEndsUse,
    /// A hold is granted locally until the release is answered.
    ReleaseStays,
    /// A force-release ends the guard and not the hold of the process.
    ForceReleasedGoesOn,
    /// A call that comes after a recall waits in its process.
    LateComersWait,
    /// A late answer to `linger` revives a hold that was released.
    LateAnswerRevives,
    /// The answer that the store has no such hold is ignored.
    GoneIgnored,
    /// The holder does not compare the fence in the answer to `linger`.
    FenceNotCompared,
    /// The holder uses all fences of an answer, although another store gave the answer before.
    LineageNotCompared,
    /// An attempt that gives up leaves its place in the queue.
    AttemptNotAbandoned,
    /// An attempt regards its first request as final although a copy of it is in flight.
    BusyIsFinal,
    /// No other call takes over the role of an asker that gives up.
    AskerLeavesNobody,
    /// The calls that wait in a process get no turn when its hold is released.
    ReleasePassesNothingOn,
    /// The calls that wait in a process get no turn when its guard is lost.
    LossPassesNothingOn,
    /// A turn that arrives after its call gave up is lost.
    TurnLost,
    /// The newest waiting call of a process gets the next turn.
    NewestFirst,
    /// After a recall, waiting calls keep the hold for their promised time although its lease is over.
    PromiseKeepsHold,
    /// After a recall, waiting calls are granted the key locally without a limit of time.
    PromiseWithoutLimit,
    /// After a recall, waiting calls are granted the key locally without a lease, for their promised time.
    PromiseWithoutLease,
    /// A grant of another token of the key does not end an older hold of the process.
    SupersededGoesOn,
    /// A grant of another token of the key ends the hold of the process even if that hold is newer.
    NewerSuperseded,
}

/// A mutant and the property that detects it.
#[derive(Clone, Copy, Debug)]
pub struct Mutant<C = Config> {
    /// Name of the mutant.
    pub name: &'static str,
    /// Rule that the mutant breaks.
    pub broken: Mutation,
    /// Run in which the mutant is checked.
    pub config: C,
    /// Property that fails, or `None` if the mutant survives.
    pub killed_by: Option<&'static str>,
}

/// Returns a mutant.
pub const fn mutant<C>(name: &'static str, broken: Mutation, config: C, killed_by: Option<&'static str>) -> Mutant<C> {
    Mutant { name, broken, config, killed_by }
}

fn run(name: &str) -> Config {
    by_name(name).unwrap_or(BASE)
}

/// Returns all mutants of the protocol.
pub fn all() -> Vec<Mutant> {
    use Mutation::*;
    let waiter = Config { name: "waiter, given up", give_up: true, renewals: 0, polls: 1, ..run("waiter") };
    let coarse = Config { name: "forget, coarse clock", fences_per_tick: 1, ..run("forget") };
    let retry = Config { name: "retry, late", last_tick: 4, renewals: 1, ..run("retry") };
    vec![
        mutant("validity-from-reply", ValidityFromReply, run("renewals"), Some("I2")),
        mutant("release-without-token", ReleaseWithoutToken, run("releases"), Some("I2")),
        mutant("extend-creates", ExtendCreates, run("extend"), Some("I3")),
        mutant("extend-from-reply", ExtendFromReply, run("extend"), Some("I2")),
        mutant("shorter-from-reply", ShorterFromReply, run("extend-shorter"), Some("I2")),
        mutant("extend-forgets", ExtendForgets, run("extend-shorter"), Some("I2")),
        mutant("both-ignores-session", IgnoresSession, run("both"), Some("I2")),
        mutant("both-from-push", LifetimeFromPush, run("both"), Some("I2")),
        mutant("grant-not-repeated", GrantNotRepeated, run("failover"), Some("L1")),
        mutant("unknown-grant-ignored", UnknownGrantIgnored, run("failover"), Some("L1")),
        mutant("detached-is-released", DetachedIsReleased, run("failover-detached"), Some("I10")),
        mutant("open-counts-again", OpenCountsAgain, run("open"), Some("I2")),
        mutant("open-revives", OpenRevives, run("open"), Some("I9")),
        mutant("expiry-without-compare", ExpiryWithoutCompare, run("blind"), Some("I2")),
        mutant("no-expiry", NoExpiry, run("base"), Some("L1")),
        mutant("plain-counter", PlainCounter, run("forget"), Some("I4")),
        mutant("loss-in-no-time", LossInNoTime, run("forget"), Some("I4")),
        mutant("coarse-clock", CoarseClock, coarse, Some("I4")),
        mutant("resource-unfenced", ResourceUnfenced, run("resource"), Some("I5")),
        mutant("fresh-token", FreshToken, run("retry"), Some("L3")),
        mutant("not-idempotent", NotIdempotent, run("fixed"), Some("I8")),
        mutant("first-release-is-final", FirstReleaseIsFinal, run("base"), Some("L3")),
        mutant("answers-after-release", AnswersAfterRelease, run("base"), Some("L3")),
        mutant("answers-per-token", AnswersPerToken, retry, Some("L3")),
        mutant("push-after-release", PushAfterRelease, waiter, Some("I2")),
        mutant("never-polls", NeverPolls, run("waiter"), Some("L2")),
        mutant("lifetime-from-request", LifetimeFromRequest, run("fixed"), Some("I2")),
        mutant("lifetime-from-last-request", LifetimeFromLastRequest, run("fixed"), Some("I2")),
        mutant("lifetime-from-push", LifetimeFromPush, run("fixed"), Some("I2")),
        mutant("late-renewal", LateRenewal, run("renewals"), Some("I7")),
        mutant("revive", Revive, run("renewals"), Some("I9")),
        mutant("revive-and-trust", ReviveAndTrust, run("renewals"), Some("I7")),
        mutant("ignores-session", IgnoresSession, run("base"), Some("I2")),
        mutant("abandon-dequeues-only", AbandonDequeuesOnly, run("base"), Some("L3")),
        mutant("head-not-popped", HeadNotPopped, run("fixed"), Some("I8")),
        mutant("force-release-without-compare", ForceReleaseWithoutCompare, run("force"), Some("I2")),
        mutant("force-release-not-reported", ForceReleaseNotReported, run("force"), Some("L4")),
        mutant("expired-not-reported", ReportAfterExpiry, run("force-fixed"), Some("L4")),
        mutant("force-release-in-two-operations", ForceReleaseInTwoOperations, run("blind-force"), Some("I8")),
        mutant("force-released-reenters", ForceReleasedReenters, run("force-retry"), Some("I8")),
        mutant("adopt-without-compare", AdoptWithoutCompare, run("adopt"), Some("I1")),
        mutant("adopt-no-not-after", AdoptNoNotAfter, run("adopt-session"), Some("L3")),
        mutant("poll-creates", PollCreates, waiter, Some("L3")),
        mutant("no-not-after", NoNotAfter, run("base"), Some("L3")),
        mutant("own-limit-counts", OwnLimitCounts, run("limits"), Some("I3")),
        mutant("held-limit-counts", HeldLimitCounts, run("kinds"), Some("I3")),
        mutant("oldest-limit-counts", OldestLimitCounts, run("limits"), Some("I3")),
        mutant("queue-passed", QueuePassed, run("kinds"), Some("I11")),
        mutant("queue-searched", QueueSearched, run("limits"), Some("I11")),
    ]
}
