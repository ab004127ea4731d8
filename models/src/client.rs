//! The client: what it believes, and what it makes of an answer. One client is one process with one session.

use crate::config::{Config, Term};
use crate::message::{Msg, Outcome, Token};
use crate::model::EXTENDED;
use crate::mutant::Break;

/// Where a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not begun.
    Idle,
    /// Its first question is not answered.
    Asking,
    /// In the queue.
    Waiting,
    /// It has a guard.
    Held,
    /// Nobody believes it any more, and it must stay in the store: detached, or lost and in its grace.
    Kept,
    /// Its token is ended until that is definite.
    Ending,
    /// Over.
    Done,
}

/// One call, with its token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// Where it is.
    pub phase: Phase,
    /// Its token.
    pub token: Token,
    /// The term it asks for.
    pub term: Term,
    /// Until when its token may be entered.
    pub not_after: u8,
    /// Requests that may create and were not answered.
    pub unanswered: u8,
    /// When it last asked. Kept only for a mutant.
    pub last_asked: u8,
    /// The fence of its guard.
    pub fence: u16,
    /// The end of a fixed term.
    pub until: u8,
    /// The shortest term that an extension without an answer asked for, and the same without the newest one.
    pub shortest: [u8; 2],
    /// Whether it had a guard.
    pub held: bool,
    /// Whether its guard was lost.
    pub lost: bool,
    /// How often it asked, polled, ended, extended, wrote.
    pub sent: [u8; 5],
}

/// A client.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Until when it believes its session.
    pub until: u8,
    /// Whether its session is over for it.
    pub over: bool,
    /// Beats sent.
    pub beats: u8,
    /// Repeated questions to open it.
    pub opens: u8,
    /// Its calls.
    pub calls: Vec<Call>,
}

impl Call {
    /// Whether the caller still wants it.
    pub fn lives(&self) -> bool {
        matches!(self.phase, Phase::Asking | Phase::Waiting | Phase::Held)
    }
}

/// What a client works with.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The bounds.
    pub config: &'a Config,
    /// The rule that is broken.
    pub broken: Option<Break>,
    /// The time.
    pub now: u8,
}

impl Rules<'_> {
    /// Whether this rule is broken.
    pub fn broken(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// Whether the client believes its session.
    pub fn session(&self, client: &Client) -> bool {
        !client.over && self.now < client.until
    }

    /// Whether the client believes the hold of a call.
    pub fn believes(&self, client: &Client, call: &Call) -> bool {
        call.phase == Phase::Held
            && (!call.term.has_deadline() || self.now < call.until)
            && (!call.term.is_bound() || self.session(client) || self.broken(Break::IgnoresSession))
    }

    /// Time has passed: what ran out is lost.
    pub fn ticked(&self, client: &mut Client) {
        let late_beats = self.broken(Break::LateBeat) || self.broken(Break::ReviveAndBelieve);
        if self.now >= client.until && !client.over {
            client.over = true;
        }
        let view = client.clone();
        for call in &mut client.calls {
            if call.phase == Phase::Held && !self.believes(&view, call) {
                call.lost = true;
                if !late_beats {
                    call.phase = Phase::Ending;
                }
            }
            if view.over && call.lives() && call.phase != Phase::Held {
                call.phase = Phase::Ending;
            }
            // The store ends what hangs on a session with the session.
            let with_session = call.term.is_bound() && !self.broken(Break::IgnoresSession);
            if view.over && matches!(call.phase, Phase::Ending | Phase::Kept) && with_session {
                call.phase = Phase::Done;
            }
        }
    }

    fn hold(&self, client: &Client, call: &mut Call, fence: u16, until: u8) {
        call.fence = fence;
        call.until = until;
        call.phase = Phase::Held;
        call.held = true;
        if !self.believes(client, call) {
            call.phase = Phase::Ending;
        }
    }

    /// Takes an answer to `acquire`, `adopt` or `poll`.
    fn outcome(&self, client: &Client, call: &mut Call, outcome: Outcome, asked: u8) {
        if !matches!(call.phase, Phase::Asking | Phase::Waiting) {
            return;
        }
        match outcome {
            Outcome::Granted { fence, remaining } => {
                let until = match remaining {
                    None => u8::MAX,
                    Some(_) if self.broken(Break::TermFromQuestion) => asked + self.config.fixed_ttl,
                    Some(remaining) if self.broken(Break::TermFromLastQuestion) => call.last_asked + remaining,
                    Some(remaining) => asked + remaining,
                };
                self.hold(client, call, fence, until);
            }
            Outcome::Queued => call.phase = Phase::Waiting,
            Outcome::Gone | Outcome::Stale | Outcome::Forced | Outcome::SessionGone => call.phase = Phase::Ending,
        }
    }

    /// Whether a grant of this token is to be ended: the store tells of it, and nobody here has it any more.
    pub fn is_nobodys(&self, client: &Client, token: Token) -> bool {
        let phase = client.calls.iter().find(|call| call.token == token).map(|call| call.phase);
        match phase {
            Some(Phase::Done) => self.config.failover && !self.broken(Break::UnknownGrantIgnored),
            Some(Phase::Kept) => self.broken(Break::KeptNotHeeded),
            _ => false,
        }
    }

    /// Takes an answer or a push.
    pub fn hear(&self, client: &mut Client, msg: &Msg) {
        if let Msg::Beaten { asked, lives, forced, .. } = msg {
            return self.beaten(client, *asked, *lives, forced);
        }
        if let Msg::Opened { asked, lives, .. } = msg {
            return self.opened(client, *asked, *lives);
        }
        let view = client.clone();
        let token = msg.token();
        let Some(call) = client.calls.iter_mut().find(|call| call.token == token) else { return };
        match *msg {
            // An answer that comes when the token is being ended is not counted: the end may have overtaken it.
            Msg::Acquired { .. } if !call.lives() && !self.broken(Break::AnswersAfterEnd) => {}
            Msg::Acquired { outcome, asked, .. } => {
                call.unanswered = call.unanswered.saturating_sub(1);
                if self.broken(Break::AnswersPerToken) {
                    call.unanswered = 0;
                }
                self.outcome(&view, call, outcome, asked);
            }
            Msg::Polled { outcome, asked, .. } => self.outcome(&view, call, outcome, asked),
            Msg::Ended { time, sure, .. } if call.phase == Phase::Ending => {
                let counted = self.broken(Break::AnswersAfterEnd) && call.unanswered == 0;
                let definite = sure || counted || time > call.not_after;
                if definite || self.broken(Break::FirstEndIsDefinite) {
                    call.phase = Phase::Done;
                }
            }
            // Whoever extends again has given up the extension before.
            Msg::Extended { nth, .. } if nth != call.sent[EXTENDED] => {}
            Msg::Extended { done, nth, asked, .. } if self.believes(&view, call) => {
                let from = if self.broken(Break::ExtendFromReply) { self.now } else { asked };
                if done {
                    call.shortest[0] = call.shortest[1];
                    let late = self.broken(Break::ExtendForgets);
                    let shortest = if late { u8::MAX } else { call.shortest[0] };
                    call.until = from + self.config.extension(nth).min(shortest);
                } else {
                    call.lost = true;
                    call.phase = Phase::Ending;
                }
            }
            Msg::PushGranted { fence, .. } => {
                let late = self.broken(Break::PushAfterEnd) && matches!(call.phase, Phase::Ending | Phase::Done);
                if (call.phase == Phase::Waiting || late) && self.session(&view) {
                    match call.term {
                        Term::Session => self.hold(&view, call, fence, u8::MAX),
                        _ if self.broken(Break::TermFromPush) => {
                            self.hold(&view, call, fence, self.now + self.config.fixed_ttl);
                        }
                        // A deadline's start is known only to the store: a poll tells.
                        Term::Fixed | Term::Both => {}
                    }
                }
            }
            Msg::PushForced { .. } if call.lives() => {
                call.lost = call.phase == Phase::Held;
                call.phase = Phase::Ending;
            }
            _ => {}
        }
    }

    /// A repeated question to open the session was answered. Its time counts from the first one.
    fn opened(&self, client: &mut Client, asked: u8, lives: bool) {
        if !self.session(client) {
            return;
        }
        if !lives {
            client.until = client.until.min(self.now);
            return self.ticked(client);
        }
        if self.broken(Break::OpenCountsAgain) {
            client.until = client.until.max(asked + self.config.session_ttl);
        }
    }

    fn beaten(&self, client: &mut Client, asked: u8, lives: bool, forced: &[Token]) {
        let late = self.broken(Break::LateBeat) || self.broken(Break::ReviveAndBelieve);
        if !self.session(client) && !late {
            return;
        }
        if !lives {
            client.until = client.until.min(self.now);
            return self.ticked(client);
        }
        let from = if self.broken(Break::ValidityFromReply) { self.now } else { asked };
        client.until = client.until.max(from + self.config.session_ttl);
        client.over = self.now >= client.until;
        for call in &mut client.calls {
            if call.lives() && forced.contains(&call.token) {
                call.lost = call.phase == Phase::Held;
                call.phase = Phase::Ending;
            }
        }
    }
}
