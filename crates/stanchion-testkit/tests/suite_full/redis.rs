//! Runs the suite on every supported version of Redis and Valkey and over every kind of connection.

use std::sync::OnceLock;

use stanchion::store::{Prefixed, Redis};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisSentinel, RedisServer, certificates};
use stanchion_testkit::{Environment, Fixture, Need, conformance};

use crate::environments::redis_at as fresh;

/// Makes a suite for each version in one layout. The first case of a suite starts its servers.
macro_rules! rows {
    ($layout:ident, $servers:ty, $start:expr, $url:expr, $($name:ident $kind:ident),* $(,)?) => {
        mod $layout {
            use super::*;
            $(
                pub(super) fn $name() -> Environment<Redis> {
                    static SERVERS: OnceLock<$servers> = OnceLock::new();
                    fresh(&$url(SERVERS.get_or_init(|| $start(Kind::$kind))))
                }
                conformance!(dynamic $name, $name);
            )*
        }
    };
}

rows!(
    alone, RedisServer, RedisServer::start, |server: &RedisServer| format!("redis://127.0.0.1:{}", server.port()),
    redis_6 Redis6, redis_7 Redis7, redis_8 Redis8, valkey_8 Valkey8, valkey_9 Valkey9,
);

rows!(
    sentinel, RedisSentinel, RedisSentinel::start, |servers: &RedisSentinel| format!("redis+sentinel://{}/main", servers.hosts()),
    redis_6 Redis6, redis_7 Redis7, redis_8 Redis8, valkey_8 Valkey8, valkey_9 Valkey9,
);

rows!(
    cluster, RedisCluster, |kind| RedisCluster::start(kind, false),
    |cluster: &RedisCluster| format!("redis+cluster://{}", cluster.hosts()),
    redis_6 Redis6, redis_7 Redis7, redis_8 Redis8, valkey_8 Valkey8, valkey_9 Valkey9,
);

conformance!(direct direct, alone::redis_7);

fn in_a_prefix() -> Environment<Prefixed<Redis>> {
    alone::redis_7().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);

fn by_unix_socket() -> Environment<Redis> {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| RedisServer::start(Kind::Redis7));
    fresh(&format!("redis+unix://{}?db=3", server.socket().display()))
}
conformance!(dynamic unix_socket, by_unix_socket);

/// Connects over verified TLS with a password.
fn over_tls() -> Environment<Redis> {
    static SERVER: OnceLock<(RedisServer, tempfile::TempDir)> = OnceLock::new();
    let (server, folder) = SERVER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (authority, certificate, key) = certificates(folder.path());
        let [authority, certificate, key] = [&authority, &certificate, &key].map(|path| path.to_str().unwrap());
        let files = ["--tls-ca-cert-file", authority, "--tls-cert-file", certificate, "--tls-key-file", key];
        let more = ["--tls-port", "--tls-auth-clients", "no", "--requirepass", "se cret"];
        (RedisServer::with(Kind::Redis7, &[&files[..], &more].concat()), folder)
    });
    let authority = folder.path().join("ca.pem");
    fresh(&format!("rediss://:se%20cret@localhost:{}?ca_file={}", server.port(), authority.display()))
}
conformance!(dynamic tls, over_tls);

/// Connects as a user with only the documented rights.
fn with_few_rights() -> Environment<Redis> {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        let server = RedisServer::start(Kind::Redis7);
        // The prefix of a case is 32 hexadecimal digits.
        let rights = include_str!("../../../stanchion/src/store/redis/access_list.txt").replace("stanchion:", "*:");
        let words: Vec<&str> =
            ["ACL", "SETUSER", "locker", "on", ">pw"].into_iter().chain(rights.split_whitespace()).collect();
        assert_eq!(server.command(&words), "OK");
        server
    });
    fresh(&format!("redis://locker:pw@127.0.0.1:{}", server.port()))
}
conformance!(dynamic least_rights, with_few_rights);

/// Starts a server behind a proxy that rejects these commands, like a managed service that lacks them.
fn refusing(refused: &'static [&'static str]) -> (RedisServer, Proxy) {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    for command in refused {
        proxy.faults().refuse_command(command, &format!("ERR unknown command '{command}', with args beginning with: "));
    }
    (server, proxy)
}

macro_rules! refusing {
    ($($name:ident [$($command:literal)+]),* $(,)?) => {
        $(fn $name() -> Environment<Redis> {
            static SERVERS: OnceLock<(RedisServer, Proxy)> = OnceLock::new();
            let (_, proxy) = SERVERS.get_or_init(|| refusing(&[$($command),+]));
            fresh(&format!("redis://127.0.0.1:{}", proxy.port()))
        })*
    };
}

refusing!(
    without_role ["ROLE"],
    without_settings ["CONFIG" "INFO" "CLIENT" "SCRIPT" "HELLO"],
    without_subscribing ["SUBSCRIBE"],
);
conformance!(dynamic role_refused, without_role);
conformance!(dynamic settings_refused, without_settings);

/// Runs the suite without subscriptions, so that handles find every change by polling.
mod subscribing_refused {
    use super::*;

    macro_rules! without_push {
        ($($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
            $(#[test] fn $case() {
                let needs: &[Need] = &[$($(Need::$need),+)?];
                if !needs.contains(&Need::Push) {
                    stanchion_testkit::erased::$case(&Fixture::fresh_erased(&without_subscribing));
                }
            })*
        };
    }
    stanchion_testkit::for_every_case!(without_push);
}
