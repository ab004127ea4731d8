//! Uses servers, proxies and users that lack a command: the store works without it, or its error names it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stanchion::store::Redis;
use stanchion::{Error, ErrorKind, Locks, RetryPolicy, Store, TokenId};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{Environment, Need, block_on, until};

use super::{SECOND, url};

type Case = (&'static str, &'static [Need], fn(&Environment<Arc<dyn Store>>));

macro_rules! table {
    ($($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
        static CASES: &[Case] =
            &[$((stringify!($case), &[$($(Need::$need),+)?], stanchion_testkit::erased::$case)),*];
    };
}
stanchion_testkit::for_every_case!(table);

/// Contains one case for each kind of operation. `suite_full` runs whole suites for the most likely rejections.
const CHOSEN: &[&str] = &[
    "reopening_keeps_the_session",
    "next_waiter_replaces_dead_holder",
    "closing_session_hands_off_its_keys",
    "other_clients_see_session_liveness",
    "free_key_is_granted_and_released",
    "concurrent_adopt_has_one_winner",
    "adopted_lingering_hold_gets_a_new_fence",
    "extend_sets_deadline_and_keeps_fence",
    "poll_finds_handoff_without_push",
    "release_grants_and_notifies_only_the_head",
    "semaphore_never_exceeds_capacity",
    "force_release_is_pushed_and_in_renewals",
    "list_selects_by_prefix_and_page",
    "lock_waits_for_earlier_holder",
    "waiting_threads_never_overlap",
];

const REJECTED: &[&str] = &[
    "ROLE",
    "INFO",
    "CONFIG",
    "CLIENT",
    "HELLO",
    "SCRIPT",
    "SUBSCRIBE",
    "PSUBSCRIBE",
    "SSUBSCRIBE",
    "UNSUBSCRIBE",
    "PUBLISH",
    "SPUBLISH",
    "SCAN",
    "CLUSTER",
    "WAIT",
    "PING",
    "ECHO",
    "COMMAND",
    "SELECT",
    "KEYS",
    "DBSIZE",
    "MULTI",
    "ACL",
    "OBJECT",
    "MEMORY",
];

/// Returns the answers of a server without the command, and of a server whose user lacks the right to it.
fn answers(command: &str) -> [String; 2] {
    let lower = command.to_lowercase();
    [
        format!("ERR unknown command '{command}', with args beginning with: "),
        format!("NOPERM this user has no permissions to run the '{lower}' command"),
    ]
}

fn proxy(server: &RedisServer, command: &str, answer: &str) -> Proxy {
    let proxy = Proxy::start(server.port(), 1);
    proxy.faults().refuse_command(command, answer);
    proxy
}

#[test]
fn suite_passes_without_rejected_commands() {
    let server = RedisServer::start(Kind::Redis7);
    let mut runs = Vec::new();
    for command in REJECTED {
        for answer in answers(command) {
            let proxy = Arc::new(proxy(&server, command, &answer));
            for (name, needs, run) in CASES.iter().filter(|(name, ..)| CHOSEN.contains(name)) {
                let is_declared = match *command {
                    "SUBSCRIBE" => needs.contains(&Need::Push),
                    "SCAN" => matches!(*name, "list_selects_by_prefix_and_page" | "waiting_threads_never_overlap"),
                    _ => false,
                };
                if !is_declared {
                    runs.push((*command, *name, proxy.clone(), *run));
                }
            }
        }
    }
    assert!(runs.len() > REJECTED.len() * 2 * (CHOSEN.len() - 4), "every chosen case exists");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some((command, name, proxy, run)) = runs.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let url = format!("{}?prefix={}", url(proxy.port()), TokenId::random().unwrap().to_hex());
                    let environment = Environment::new(move || Redis::from_url(&url).unwrap()).erase();
                    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&environment)));
                    assert!(ended.is_ok(), "{name} without {command}");
                }
            });
        }
    });
}

#[test]
fn rejected_commands_cause_warnings() {
    let server = RedisServer::with(Kind::Redis7, &["--appendonly", "yes", "--appendfsync", "always"]);
    block_on(async {
        for (command, expected) in [
            ("ROLE", "ROLE is rejected"),
            ("CONFIG", "settings cannot be read"),
            ("INFO", "settings cannot be read"),
            ("SCAN", "keys cannot be listed (SCAN)"),
            ("SUBSCRIBE", "notifications unavailable, falling back to polling once per second"),
        ] {
            for answer in answers(command) {
                let proxy = proxy(&server, command, &answer);
                let locks = Locks::open(&url(proxy.port())).await.unwrap();
                let has_warned = async || locks.warnings().iter().any(|warning| warning.contains(expected));
                until(&format!("{command}: {answer}: {:?}", locks.warnings()), has_warned).await;
                assert_eq!(locks.warnings().len(), 1, "{:?}", locks.warnings());
                locks.lock("k").await.unwrap().release().await.unwrap();
            }
        }
        // Scripts send the messages, so a proxy that rejects such commands outside of scripts changes nothing.
        for command in ["PUBLISH", "PING", "CLIENT", "SCRIPT", "HELLO"] {
            let proxy = proxy(&server, command, &answers(command)[0]);
            let locks = Locks::open(&url(proxy.port())).await.unwrap();
            assert_eq!(locks.warnings(), Vec::<String>::new(), "{command}");
        }
    });
    let renamed = RedisServer::with(
        Kind::Redis7,
        &["--appendonly", "yes", "--appendfsync", "always", "--rename-command", "PUBLISH", ""],
    );
    assert_eq!(server.command(&["ACL", "SETUSER", "quiet", "on", ">pw", "~*", "&*", "+@all", "-publish"]), "OK");
    block_on(async {
        for url in [url(renamed.port()), format!("redis://quiet:pw@127.0.0.1:{}", server.port())] {
            let locks = Locks::open(&url).await.unwrap();
            let has_warned =
                async || locks.warnings().iter().any(|warning| warning.contains("notifications cannot be sent"));
            until("the warning arrives", has_warned).await;
            let held = locks.lock("k").await.unwrap();
            let waiting = tokio::spawn(locks.lock("k").into_future());
            until("queued", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
            held.release().await.unwrap();
            waiting.await.unwrap().unwrap().release().await.unwrap();
        }
    });
}

async fn open_error(url: &str) -> Error {
    let short = RetryPolicy { total: SECOND / 2, ..RetryPolicy::default() };
    Locks::builder(url).retry(short).open().await.map(drop).unwrap_err()
}

#[test]
fn rejected_scripts_name_command_and_grant() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        for command in ["EVALSHA", "EVAL"] {
            server.command(&["SCRIPT", "FLUSH"]);
            let [unknown, forbidden] = answers(command);
            let error = open_error(&url(proxy(&server, command, &unknown).port())).await;
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unsupported, false), "{error}");
            assert!(error.to_string().contains(&format!("needs {command}")), "{error}");
            let error = open_error(&url(proxy(&server, command, &forbidden).port())).await;
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
            assert!(error.to_string().contains(&format!("+{}`", command.to_lowercase())), "{error}");
        }
        // Commands within scripts are named too.
        for command in ["set", "get", "time"] {
            let user = format!("no-{command}");
            let right = format!("-{command}");
            server.command(&["ACL", "SETUSER", &user, "on", ">pw", "~*", "&*", "+@all", &right]);
            let error = open_error(&format!("redis://{user}:pw@127.0.0.1:{}", server.port())).await;
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
            assert!(error.to_string().contains(&format!("+{command} ")), "{error}");
        }
        // `min_replicas` cannot be kept without WAIT, so its rejection is an error and no warning.
        for answer in answers("WAIT") {
            let proxy = proxy(&server, "WAIT", &answer);
            let error = open_error(&format!("{}?min_replicas=1", url(proxy.port()))).await;
            assert!(!error.is_transient() && error.to_string().to_uppercase().contains("WAIT"), "{error}");
        }
    });
}

#[test]
fn rejected_write_reveals_a_hidden_replica() {
    let primary = RedisServer::start(Kind::Redis7);
    let replica = RedisServer::with(Kind::Redis7, &["--replicaof", &format!("127.0.0.1 {}", primary.port())]);
    let proxy = proxy(&replica, "ROLE", &answers("ROLE")[0]);
    block_on(async {
        let error = open_error(&url(proxy.port())).await;
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
        assert!(error.to_string().contains("is a replica"), "{error}");
        // The replica becomes a primary, and is used.
        assert_eq!(replica.command(&["REPLICAOF", "NO", "ONE"]), "OK");
        let locks = Locks::open(&url(proxy.port())).await.unwrap();
        locks.lock("k").await.unwrap().release().await.unwrap();
        // The server becomes a replica again while it is used.
        replica.command(&["REPLICAOF", "127.0.0.1", &primary.port().to_string()]);
        let error = locks.lock("k").wait(SECOND).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("is a replica"), "{error}");
        replica.command(&["REPLICAOF", "NO", "ONE"]);
        until("a primary again", async || locks.try_lock("k").await.is_ok_and(|guard| guard.is_some())).await;
    });
}

#[test]
fn unencrypted_password_causes_a_warning() {
    let more = ["--requirepass", "secret", "--bind", "0.0.0.0", "--appendonly", "yes", "--appendfsync", "always"];
    let server = RedisServer::with(Kind::Redis7, &more);
    block_on(async {
        // This address is not the loopback's, but leads here all the same.
        let locks = Locks::open(&format!("redis://:secret@0.0.0.0:{}", server.port())).await.unwrap();
        let warnings = locks.warnings();
        assert!(matches!(&warnings[..], [one] if one.contains("unencrypted: use `rediss`")), "{warnings:?}");
        assert!(!warnings[0].contains("secret"));
        let locks = Locks::open(&format!("redis://:secret@127.0.0.1:{}", server.port())).await.unwrap();
        assert_eq!(locks.warnings(), Vec::<String>::new());
    });
}
