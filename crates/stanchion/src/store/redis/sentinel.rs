//! The sentinels of a service: which server is its primary.
//!
//! # Whom to take
//! All sentinels are asked, and the newest word counts, by their own numbering: one that missed a failover, or that is on
//! the wrong side of a partition, does not lead to a server that was replaced. One that is silent is not waited for.
//!
//! The sentinels name a new primary only when they have looked at it the next time, up to a second after it began to take
//! writes. The one that leads the failover tells before that whom it has chosen. So the chosen replica is asked itself,
//! and is taken as soon as it says that it is the primary. A replica that anybody else promoted is not taken, and while
//! one was chosen, or while the sentinels agree that the lost one is down, that one is not taken either.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, FromRedisValue, RedisError};

use super::config::{Address, Config};
use super::connect::Local;
use super::error::{error, while_connecting};
use super::node::{CONNECT_WITHIN, connect, in_task, too_slow, within};
use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, Result};

/// How long one sentinel may take, and how long the others still have when one has answered.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const STRAGGLERS_WITHIN: Duration = Duration::from_millis(200);

/// Who asks within this time after a search that found nothing gets the same answer: a thousand tasks are no storm.
const NOTHING_NEW_WITHIN: Duration = Duration::from_millis(50);

/// The servers of one service, as its sentinels know them.
#[derive(Debug)]
pub(super) struct Group {
    sentinels: Vec<Address>,
    service: String,
    known: Mutex<Known>,
    /// One at a time asks.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    primary: Option<Address>,
    /// The primary that there was, until there is one again.
    lost: Option<Address>,
    /// The last search, if it found nothing.
    nothing: Option<(BootTime, ErrorKind, String)>,
}

/// What one sentinel says.
#[derive(Clone, Debug)]
struct Word {
    primary: Address,
    /// A word with a higher number is newer.
    epoch: u64,
    /// The sentinels agree that the primary is down.
    is_down: bool,
    /// The replica that is to take its place.
    chosen: Option<Address>,
}

impl Group {
    pub(super) fn new(sentinels: Vec<Address>, service: String) -> Self {
        Self { sentinels, service, known: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn primary(&self) -> Option<Address> {
        self.lock().primary.clone()
    }

    /// This server does not serve: if it was the primary, another may be by now.
    pub(super) fn lost(&self, address: &Address) {
        let mut known = self.lock();
        if known.primary.as_ref() == Some(address) {
            known.lost = known.primary.take();
        }
    }

    /// The primary: the one that is known, or the one that the sentinels say.
    pub(super) async fn find(&self, config: &Config, local: &Local, clock: &Clock) -> Result<Address> {
        let _one_at_a_time = self.asking.lock().await;
        let lost = {
            let known = self.lock();
            if let Some(primary) = &known.primary {
                return Ok(primary.clone());
            }
            if let Some((at, kind, message)) = &known.nothing
                && clock.now().since(*at) < NOTHING_NEW_WITHIN
            {
                return Err(error(*kind, message.clone()));
            }
            known.lost.clone()
        };
        let found = self.ask(config, local, lost).await;
        let mut known = self.lock();
        match &found {
            Ok(primary) => *known = Known { primary: Some(primary.clone()), ..Known::default() },
            Err(fault) => known.nothing = Some((clock.now(), fault.kind(), fault.message().to_owned())),
        }
        found
    }

    async fn ask(&self, config: &Config, local: &Local, lost: Option<Address>) -> Result<Address> {
        let clients = self.sentinels.iter().map(|sentinel| Ok((sentinel.clone(), config.sentinel(sentinel)?)));
        let clients: Vec<_> = clients.collect::<Result<_>>()?;
        let service = self.service.clone();
        let words = in_task(local, async move {
            let ask = |(sentinel, client)| {
                let service = &service;
                async move { ask_one(&sentinel, &client, service).await }
            };
            let mut asked: FuturesUnordered<_> = clients.into_iter().map(ask).collect();
            let (mut words, mut fault) = (Vec::new(), None);
            let mut patience = ANSWER_WITHIN;
            while let Some(Some(answer)) = within(patience, asked.next()).await {
                match answer {
                    Ok(word) => {
                        words.push(word);
                        patience = STRAGGLERS_WITHIN;
                    }
                    // That there is no such service says more than that one sentinel is away.
                    Err(other) if fault.as_ref().is_none_or(|_: &Error| !other.is_transient()) => fault = Some(other),
                    Err(_) => {}
                }
            }
            (words, fault)
        });
        let (words, fault) = words.await?;
        let Some(newest) = newest(&words, lost.as_ref()) else {
            return Err(fault.unwrap_or_else(|| error(ErrorKind::Unavailable, "no sentinel answers")));
        };
        let Some(lost) = lost.filter(|lost| *lost == newest.primary) else { return Ok(newest.primary.clone()) };
        for chosen in words.iter().filter_map(|word| word.chosen.as_ref()) {
            if is_primary(config, local, chosen).await {
                return Ok(chosen.clone());
            }
        }
        if words.iter().any(|word| word.is_down || word.chosen.is_some()) {
            return Err(error(ErrorKind::Unavailable, format!("{lost} is down, and no other is primary yet")));
        }
        Ok(lost)
    }
}

/// The newest word. A user with few rights is told no numbers: of two that are equally new, the one that names another than
/// the lost one, and then the one that more of them say.
fn newest<'a>(words: &'a [Word], lost: Option<&Address>) -> Option<&'a Word> {
    let agree = |primary: &Address| words.iter().filter(|word| word.primary == *primary).count();
    words.iter().max_by_key(|word| (word.epoch, lost != Some(&word.primary), agree(&word.primary)))
}

/// What one sentinel says.
async fn ask_one(sentinel: &Address, client: &Client, service: &str) -> Result<Word> {
    let options = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER_WITHIN))
        .set_response_timeout(Some(ANSWER_WITHIN));
    let answer = async {
        let connection = client.get_multiplexed_async_connection_with_config(&options).await?;
        // At once, because a sentinel may be far, and the name last: it is not older than the number that comes with it.
        let (primary, replicas, named) = tokio::join!(
            ask::<HashMap<String, String>>(connection.clone(), "MASTER", service),
            ask::<Vec<HashMap<String, String>>>(connection.clone(), "REPLICAS", service),
            ask::<Option<(String, u16)>>(connection.clone(), "GET-MASTER-ADDR-BY-NAME", service),
        );
        let Some((host, port)) = named? else { return Ok(None) };
        let mut word = Word { primary: Address::Tcp { host, port }, epoch: 0, is_down: false, chosen: None };
        // Without the right to ask, or from something that only speaks like a sentinel, the name has to do.
        word.describe(&primary.unwrap_or_default());
        word.chosen = chosen(&replicas.unwrap_or_default());
        Ok(Some(word))
    };
    let answer = within(ANSWER_WITHIN, answer).await.unwrap_or_else(|| Err(too_slow(ANSWER_WITHIN)));
    let word = answer.map_err(|fault: RedisError| while_connecting(sentinel, &fault))?;
    word.ok_or_else(|| error(ErrorKind::Misconfigured, format!("the sentinel {sentinel} knows no service `{service}`")))
}

async fn ask<T: FromRedisValue>(
    mut connection: MultiplexedConnection,
    what: &str,
    service: &str,
) -> Result<T, RedisError> {
    redis::cmd("SENTINEL").arg(what).arg(service).query_async(&mut connection).await
}

fn has_flag(server: &HashMap<String, String>, flag: &str) -> bool {
    server.get("flags").is_some_and(|flags| flags.split(',').any(|one| one == flag))
}

impl Word {
    fn describe(&mut self, primary: &HashMap<String, String>) {
        self.epoch = primary.get("config-epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
        self.is_down = has_flag(primary, "o_down");
    }
}

/// The replica that is being promoted. Only the sentinel that was elected to lead the failover knows.
fn chosen(replicas: &[HashMap<String, String>]) -> Option<Address> {
    let chosen = replicas.iter().find(|replica| has_flag(replica, "promoted"))?;
    Some(Address::Tcp { host: chosen.get("ip")?.clone(), port: chosen.get("port")?.parse().ok()? })
}

/// Whether the server says of itself that it is a primary.
async fn is_primary(config: &Config, local: &Local, address: &Address) -> bool {
    let Ok(client) = config.server(address) else { return false };
    let role = in_task(local, async move { within(CONNECT_WITHIN, connect(&client)).await });
    matches!(role.await, Ok(Some(Ok((_, Some(role))))) if role == "master")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(port: u16, epoch: u64) -> Word {
        Word { primary: Address::Tcp { host: "h".into(), port }, epoch, is_down: false, chosen: None }
    }

    #[test]
    fn the_newest_word_counts() {
        let lost = word(1, 0).primary;
        let port = |words: &[Word]| match &newest(words, Some(&lost)).unwrap().primary {
            Address::Tcp { port, .. } => *port,
            Address::Unix(_) => 0,
        };
        // One sentinel missed the last failover, and names the primary before the lost one.
        assert_eq!(port(&[word(2, 3), word(1, 4), word(1, 4)]), 1);
        // One sentinel missed this failover.
        assert_eq!(port(&[word(1, 4), word(2, 5)]), 2);
        assert_eq!(port(&[word(2, 5), word(1, 4)]), 2);
        // Nobody tells numbers.
        assert_eq!(port(&[word(1, 0), word(2, 0), word(1, 0)]), 2);
    }

    #[test]
    fn without_numbers_most_of_them_count_unless_one_was_lost() {
        let words = [word(1, 0), word(1, 0), word(2, 0)];
        let at = |port| word(port, 0).primary;
        assert_eq!(newest(&words, None).unwrap().primary, at(1));
        assert_eq!(newest(&words, Some(&at(1))).unwrap().primary, at(2));
        // One that tells a number knows more than all who do not.
        assert_eq!(newest(&[word(1, 0), word(2, 1), word(1, 0)], None).unwrap().primary, at(2));
    }

    #[test]
    fn the_chosen_replica_is_the_one_that_is_being_promoted() {
        let replica = |port: &str, flags: &str| {
            let fields = [("ip", "10.0.0.1"), ("port", port), ("flags", flags)];
            fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
        };
        assert_eq!(chosen(&[replica("1", "slave"), replica("2", "s_down,slave")]), None);
        let found = chosen(&[replica("1", "slave"), replica("2", "slave,promoted")]).unwrap();
        assert_eq!(found.to_string(), "10.0.0.1:2");
    }
}
