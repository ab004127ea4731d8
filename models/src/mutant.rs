//! Mutants: one rule broken at a time.

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
    /// An answer is counted for every question of its token.
    AnswersPerToken,
    /// An answer counts although it came after the end of its token was sent.
    AnswersAfterEnd,
    /// An extension counts from its answer.
    ExtendFromReply,
}
