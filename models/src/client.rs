//! Models a client: its calls, its view of session and holds, and its reaction to responses. One client is one process
//! with one session.

use crate::config::{Config, Lifetime};
use crate::message::{Msg, Outcome, Token};
use crate::model::EXTENDS;
use crate::mutant::Mutation;

/// Phase of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The call has not started.
    Idle,
    /// The call has sent `acquire` and has no response yet.
    Acquiring,
    /// The call is in the queue.
    Waiting,
    /// The call has a guard.
    Held,
    /// The client does not rely on the hold any more, but the hold must stay in the store: it is detached, or lost and
    /// in its grace.
    Detached,
    /// The client keeps releasing the token until it is certain that the token can no longer hold anything.
    Releasing,
    /// The call has ended.
    Done,
}

/// A call and its token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// Current phase.
    pub phase: Phase,
    /// Token of the call.
    pub token: Token,
    /// Requested lifetime.
    pub lifetime: Lifetime,
    /// Latest time at which the store may enter the token.
    pub not_after: u8,
    /// Number of acquires without a response.
    pub unanswered: u8,
    /// Time at which the last request was sent. Only a mutant uses it.
    pub last_sent_at: u8,
    /// Fence of the guard.
    pub fence: u16,
    /// End of a fixed lifetime.
    pub valid_until: u8,
    /// Shortest lifetime that an unanswered extension requested, and the same without the newest extension.
    pub shortest: [u8; 2],
    /// Whether the call has ever had a guard.
    pub held: bool,
    /// Whether the guard was lost.
    pub lost: bool,
    /// Number of acquires, polls, releases, extensions and writes that were sent.
    pub sent: [u8; 5],
}

/// A client.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Time until which the client regards its session as valid.
    pub valid_until: u8,
    /// Whether the client regards its session as expired.
    pub is_expired: bool,
    /// Number of renewals that were sent.
    pub renewals: u8,
    /// Number of repeated requests to open the session.
    pub opens: u8,
    /// Calls of this client.
    pub calls: Vec<Call>,
}

impl Call {
    /// Returns whether the caller still wants the hold.
    pub fn is_alive(&self) -> bool {
        matches!(self.phase, Phase::Acquiring | Phase::Waiting | Phase::Held)
    }
}

/// Applies a client's rules at one time.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// Bounds of the run.
    pub config: &'a Config,
    /// Rule that is broken.
    pub broken: Option<Mutation>,
    /// Current time.
    pub now: u8,
}

impl Rules<'_> {
    /// Returns whether this rule is broken.
    pub fn broken(&self, rule: Mutation) -> bool {
        self.broken == Some(rule)
    }

    /// Returns whether the client regards its session as valid.
    pub fn is_session_valid(&self, client: &Client) -> bool {
        !client.is_expired && self.now < client.valid_until
    }

    /// Returns whether the client regards the hold of a call as valid.
    pub fn is_hold_valid(&self, client: &Client, call: &Call) -> bool {
        call.phase == Phase::Held
            && (!call.lifetime.has_deadline() || self.now < call.valid_until)
            && (!call.lifetime.is_bound() || self.is_session_valid(client) || self.broken(Mutation::IgnoresSession))
    }

    /// Marks sessions and holds as lost if their time is over.
    pub fn expire(&self, client: &mut Client) {
        let accepts_late = self.broken(Mutation::LateRenewal) || self.broken(Mutation::ReviveAndTrust);
        if self.now >= client.valid_until && !client.is_expired {
            client.is_expired = true;
        }
        let view = client.clone();
        for call in &mut client.calls {
            if call.phase == Phase::Held && !self.is_hold_valid(&view, call) {
                call.lost = true;
                if !accepts_late {
                    call.phase = Phase::Releasing;
                }
            }
            if view.is_expired && call.is_alive() && call.phase != Phase::Held {
                call.phase = Phase::Releasing;
            }
            // The store expires session-bound holds with their session.
            let with_session = call.lifetime.is_bound() && !self.broken(Mutation::IgnoresSession);
            if view.is_expired && matches!(call.phase, Phase::Releasing | Phase::Detached) && with_session {
                call.phase = Phase::Done;
            }
        }
    }

    fn hold(&self, client: &Client, call: &mut Call, fence: u16, until: u8) {
        call.fence = fence;
        call.valid_until = until;
        call.phase = Phase::Held;
        call.held = true;
        if !self.is_hold_valid(client, call) {
            call.phase = Phase::Releasing;
        }
    }

    /// Handles a response to `acquire`, `adopt` or `poll`.
    fn outcome(&self, client: &Client, call: &mut Call, outcome: Outcome, sent_at: u8) {
        if !matches!(call.phase, Phase::Acquiring | Phase::Waiting) {
            return;
        }
        match outcome {
            Outcome::Granted { fence, remaining } => {
                let until = match remaining {
                    None => u8::MAX,
                    Some(_) if self.broken(Mutation::LifetimeFromRequest) => sent_at + self.config.fixed_ttl,
                    Some(remaining) if self.broken(Mutation::LifetimeFromLastRequest) => call.last_sent_at + remaining,
                    Some(remaining) => sent_at + remaining,
                };
                self.hold(client, call, fence, until);
            }
            Outcome::Queued => call.phase = Phase::Waiting,
            Outcome::Gone | Outcome::Stale | Outcome::ForceReleased | Outcome::SessionGone | Outcome::Busy { .. } => {
                call.phase = Phase::Releasing
            }
        }
    }

    /// Returns whether the client must release a reported grant because no call has it any more.
    pub fn is_orphaned(&self, client: &Client, token: Token) -> bool {
        let phase = client.calls.iter().find(|call| call.token == token).map(|call| call.phase);
        match phase {
            Some(Phase::Done) => self.config.failover && !self.broken(Mutation::UnknownGrantIgnored),
            Some(Phase::Detached) => self.broken(Mutation::DetachedIsReleased),
            _ => false,
        }
    }

    /// Handles a response or a push.
    pub fn receive(&self, client: &mut Client, msg: &Msg) {
        if let Msg::Renewed { sent_at, is_alive, force_released, .. } = msg {
            return self.renewed(client, *sent_at, *is_alive, force_released);
        }
        if let Msg::Opened { sent_at, is_alive, .. } = msg {
            return self.opened(client, *sent_at, *is_alive);
        }
        let view = client.clone();
        let token = msg.token();
        let Some(call) = client.calls.iter_mut().find(|call| call.token == token) else { return };
        match *msg {
            // Ignore a response that arrives during the release, because the release may have overtaken the acquire.
            Msg::Acquired { .. } if !call.is_alive() && !self.broken(Mutation::AnswersAfterRelease) => {}
            Msg::Acquired { outcome, sent_at, .. } => {
                call.unanswered = call.unanswered.saturating_sub(1);
                if self.broken(Mutation::AnswersPerToken) {
                    call.unanswered = 0;
                }
                self.outcome(&view, call, outcome, sent_at);
            }
            Msg::Polled { outcome, sent_at, .. } => self.outcome(&view, call, outcome, sent_at),
            Msg::Released { time, is_final, .. } if call.phase == Phase::Releasing => {
                let is_counted = self.broken(Mutation::AnswersAfterRelease) && call.unanswered == 0;
                let is_definite = is_final || is_counted || time > call.not_after;
                if is_definite || self.broken(Mutation::FirstReleaseIsFinal) {
                    call.phase = Phase::Done;
                }
            }
            // A client that extends again has given up the previous extension.
            Msg::Extended { nth, .. } if nth != call.sent[EXTENDS] => {}
            Msg::Extended { done, nth, sent_at, .. } if self.is_hold_valid(&view, call) => {
                let from = if self.broken(Mutation::ExtendFromReply) { self.now } else { sent_at };
                if done {
                    call.shortest[0] = call.shortest[1];
                    let late = self.broken(Mutation::ExtendForgets);
                    let shortest = if late { u8::MAX } else { call.shortest[0] };
                    call.valid_until = from + self.config.extension(nth).min(shortest);
                } else {
                    call.lost = true;
                    call.phase = Phase::Releasing;
                }
            }
            Msg::PushGranted { fence, .. } => {
                let late =
                    self.broken(Mutation::PushAfterRelease) && matches!(call.phase, Phase::Releasing | Phase::Done);
                if (call.phase == Phase::Waiting || late) && self.is_session_valid(&view) {
                    match call.lifetime {
                        Lifetime::Session => self.hold(&view, call, fence, u8::MAX),
                        _ if self.broken(Mutation::LifetimeFromPush) => {
                            self.hold(&view, call, fence, self.now + self.config.fixed_ttl);
                        }
                        // Only the store knows when the lifetime began, so the client must poll.
                        Lifetime::Fixed | Lifetime::Both => {}
                    }
                }
            }
            Msg::PushForceReleased { .. } if call.is_alive() => {
                call.lost = call.phase == Phase::Held;
                call.phase = Phase::Releasing;
            }
            _ => {}
        }
    }

    /// Handles the response to a repeated request to open the session. The session's time began with the first request.
    fn opened(&self, client: &mut Client, sent_at: u8, is_alive: bool) {
        if !self.is_session_valid(client) {
            return;
        }
        if !is_alive {
            client.valid_until = client.valid_until.min(self.now);
            return self.expire(client);
        }
        if self.broken(Mutation::OpenCountsAgain) {
            client.valid_until = client.valid_until.max(sent_at + self.config.session_ttl);
        }
    }

    fn renewed(&self, client: &mut Client, sent_at: u8, is_alive: bool, force_released: &[Token]) {
        let late = self.broken(Mutation::LateRenewal) || self.broken(Mutation::ReviveAndTrust);
        if !self.is_session_valid(client) && !late {
            return;
        }
        if !is_alive {
            client.valid_until = client.valid_until.min(self.now);
            return self.expire(client);
        }
        let from = if self.broken(Mutation::ValidityFromReply) { self.now } else { sent_at };
        client.valid_until = client.valid_until.max(from + self.config.session_ttl);
        client.is_expired = self.now >= client.valid_until;
        for call in &mut client.calls {
            if call.is_alive() && force_released.contains(&call.token) {
                call.lost = call.phase == Phase::Held;
                call.phase = Phase::Releasing;
            }
        }
    }
}
