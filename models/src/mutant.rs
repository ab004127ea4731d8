//! Mutants: one rule broken at a time.

use crate::config::{BASE, Config};
use crate::runs::by_name;

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Break {
    /// A session's validity is counted from the answer of a beat, not from before its question.
    ValidityFromReply,
    /// `release` ends whatever hold there is.
    ReleaseWithoutToken,
    /// `extend` enters a hold that is gone.
    ExtendCreates,
    /// A takeover ends whatever hold there is.
    TakeoverWithoutCompare,
    /// Fences are counted from the record alone, without the clock.
    PlainCounter,
    /// The resource accepts every write.
    ResourceUnfenced,
    /// A repeated `acquire` has a fresh token.
    FreshToken,
    /// The first answer to `release` or `abandon` ends the token.
    FirstEndIsDefinite,
    /// A push is believed although its call was ended.
    PushAfterEnd,
    /// A waiter lives by pushes alone.
    NeverAsksAgain,
    /// A fixed term counts as a whole from the question that was answered.
    TermFromQuestion,
    /// A fixed term counts from the last question that was asked, whichever was answered.
    TermFromLastQuestion,
    /// A fixed term is believed on the push.
    TermFromPush,
    /// A beat's answer is accepted after the local deadline.
    LateBeat,
    /// `abandon` ends only the place in the queue.
    AbandonQueueOnly,
    /// The head of the queue is granted and stays in the queue.
    HeadNotPopped,
    /// A forced release ends whatever hold there is.
    ForceWithoutCompare,
    /// The store revives a dead session by a beat.
    Revive,
    /// The store revives a dead session, and the client believes it.
    ReviveAndBelieve,
    /// `adopt` does not compare the token.
    AdoptWithoutCompare,
    /// `poll` enters what is not there.
    PollCreates,
    /// `acquire` is good for ever.
    NoNotAfter,
    /// `adopt` is good for ever.
    AdoptNoNotAfter,
    /// A hold is believed although the session is over.
    IgnoresSession,
    /// A repeated `acquire` is a new question to the store.
    NotIdempotent,
    /// Nobody takes over from a dead session.
    NoTakeover,
    /// A forced release is told by push only.
    ForceNotTold,
    /// A token that was forced out may be entered again.
    ForcedReenters,
    /// A forced release is recorded against the session by a step of its own, which may be late.
    ForceInTwoSteps,
    /// An answer is counted for every question of its token.
    AnswersPerToken,
    /// An answer counts although it came after the end of its token was sent.
    AnswersAfterEnd,
    /// The records are lost and the store is back within one unit of its clock.
    LossInNoTime,
    /// More grants than units of the store's clock.
    CoarseClock,
    /// Not a rule but a wish: a holder is told of a forced release although its session is over.
    TellTheDead,
    /// An extension counts from its answer.
    ExtendFromReply,
    /// A shorter extension counts only when it is answered.
    ShorterFromReply,
    /// An extension without an answer is forgotten when the next one is answered.
    ExtendForgets,
    /// Holders are not told again of what they hold when somebody waits for it.
    GrantNotToldAgain,
    /// A grant that nobody has any more is not ended when it is told again.
    UnknownGrantIgnored,
    /// A grant that is told again is ended although it is detached or in its grace.
    KeptNotHeeded,
    /// A session counts from a repeated question to open it.
    OpenCountsAgain,
    /// A repeated question opens a session that has ended.
    OpenRevives,
    /// A request looks at its own capacity alone.
    OwnLimitCounts,
    /// A request looks at the capacities of the holds alone, if there are any.
    HeldLimitCounts,
    /// A request looks at the capacity of the oldest hold alone, if there is one.
    OldestLimitCounts,
    /// A request that fits passes those that wait.
    QueuePassed,
    /// The first of the queue that fits is granted, not the head alone.
    QueueSearched,
}

/// A mutant and what kills it.
#[derive(Clone, Copy, Debug)]
pub struct Mutant {
    /// Its name.
    pub name: &'static str,
    /// The rule that it breaks.
    pub broken: Break,
    /// The run that it is put into.
    pub config: Config,
    /// The property that kills it; nothing, if it survives.
    pub killed_by: Option<&'static str>,
}

const fn mutant(name: &'static str, broken: Break, config: Config, killed_by: Option<&'static str>) -> Mutant {
    Mutant { name, broken, config, killed_by }
}

fn run(name: &str) -> Config {
    by_name(name).unwrap_or(BASE)
}

/// All mutants.
pub fn all() -> Vec<Mutant> {
    use Break::*;
    let waiter = Config { name: "waiter, given up", give_up: true, beats: 0, polls: 1, ..run("waiter") };
    let coarse = Config { name: "forget, coarse clock", fences_per_tick: 1, ..run("forget") };
    let retry = Config { name: "retry, late", last_tick: 4, beats: 1, ..run("retry") };
    vec![
        mutant("validity-from-reply", ValidityFromReply, run("beats"), Some("I2")),
        mutant("release-without-token", ReleaseWithoutToken, run("ends"), Some("I2")),
        mutant("extend-creates", ExtendCreates, run("extend"), Some("I3")),
        mutant("extend-from-reply", ExtendFromReply, run("extend"), Some("I2")),
        mutant("shorter-from-reply", ShorterFromReply, run("extend-shorter"), Some("I2")),
        mutant("extend-forgets", ExtendForgets, run("extend-shorter"), Some("I2")),
        mutant("both-ignores-session", IgnoresSession, run("both"), Some("I2")),
        mutant("both-from-push", TermFromPush, run("both"), Some("I2")),
        mutant("grant-not-told-again", GrantNotToldAgain, run("failover"), Some("L1")),
        mutant("unknown-grant-ignored", UnknownGrantIgnored, run("failover"), Some("L1")),
        mutant("kept-not-heeded", KeptNotHeeded, run("failover-kept"), Some("I10")),
        mutant("open-counts-again", OpenCountsAgain, run("open"), Some("I2")),
        mutant("open-revives", OpenRevives, run("open"), Some("I9")),
        mutant("takeover-without-compare", TakeoverWithoutCompare, run("blind"), Some("I2")),
        mutant("no-takeover", NoTakeover, run("base"), Some("L1")),
        mutant("plain-counter", PlainCounter, run("forget"), Some("I4")),
        mutant("loss-in-no-time", LossInNoTime, run("forget"), Some("I4")),
        mutant("coarse-clock", CoarseClock, coarse, Some("I4")),
        mutant("resource-unfenced", ResourceUnfenced, run("resource"), Some("I5")),
        mutant("fresh-token", FreshToken, run("retry"), Some("L3")),
        mutant("not-idempotent", NotIdempotent, run("fixed"), Some("I8")),
        mutant("first-end-is-definite", FirstEndIsDefinite, run("base"), Some("L3")),
        mutant("answers-after-end", AnswersAfterEnd, run("base"), Some("L3")),
        mutant("answers-per-token", AnswersPerToken, retry, Some("L3")),
        mutant("push-after-end", PushAfterEnd, waiter, Some("I2")),
        mutant("never-asks-again", NeverAsksAgain, run("waiter"), Some("L2")),
        mutant("term-from-question", TermFromQuestion, run("fixed"), Some("I2")),
        mutant("term-from-last-question", TermFromLastQuestion, run("fixed"), Some("I2")),
        mutant("term-from-push", TermFromPush, run("fixed"), Some("I2")),
        mutant("late-beat", LateBeat, run("beats"), Some("I7")),
        mutant("revive", Revive, run("beats"), Some("I9")),
        mutant("revive-and-believe", ReviveAndBelieve, run("beats"), Some("I7")),
        mutant("ignores-session", IgnoresSession, run("base"), Some("I2")),
        mutant("abandon-queue-only", AbandonQueueOnly, run("base"), Some("L3")),
        mutant("head-not-popped", HeadNotPopped, run("fixed"), Some("I8")),
        mutant("force-without-compare", ForceWithoutCompare, run("force"), Some("I2")),
        mutant("force-not-told", ForceNotTold, run("force"), Some("L4")),
        mutant("dead-not-told", TellTheDead, run("force-fixed"), Some("L4")),
        mutant("force-in-two-steps", ForceInTwoSteps, run("blind-force"), Some("I8")),
        mutant("forced-reenters", ForcedReenters, run("force-retry"), Some("I8")),
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

/// The mutant of this name.
pub fn by_mutant(name: &str) -> Option<Mutant> {
    all().into_iter().find(|mutant| mutant.name == name)
}
