//! Keys: names of any content, and the state that the store shows of a key.

use std::time::Duration;

use stanchion::Store;
use stanchion::store::{AcquireRequest, Demand, Lifetime, Listing};
use stanchion::{Key, MAX_KEY_BYTES};

use crate::environment::{Environment, key, read_pages};

fn odd_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "/",
        ".",
        "..",
        "a/b",
        "a/../b",
        "//",
        "__x__",
        "{a}b",
        "{}",
        "a:b",
        ":",
        "1:a",
        "%2F",
        "%",
        "*",
        "?",
        "[a]",
        "'",
        "\"",
        "`",
        "\\",
        ";",
        "--",
        "a b",
        " a",
        "a ",
        "\t",
        "\n",
        "\u{1b}[2J",
        "\u{7f}",
        "Ключ",
        "鍵",
        "مفتاح",
        "🔒",
        "e\u{301}",
        "ﬁ",
        "fi",
        "K",
        "k",
        "\u{212a}",
        "a",
        "A",
        "ä",
        "constructor",
        "__proto__",
        "null",
        "0",
        "fence",
        "id",
        "queue",
        "keys",
        "holds",
        "sessions",
        "x'; DROP TABLE holds; --",
        "\u{feff}",
        "\u{202e}x",
        "\u{200b}",
    ]
    .map(str::to_owned)
    .into();
    names.push("x".repeat(MAX_KEY_BYTES));
    names.push("鍵".repeat(MAX_KEY_BYTES / 3));
    names
}

pub async fn keys_of_any_content_stay_distinct<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut keys: Vec<Key> = odd_names().iter().map(|name| key(name)).collect();
    keys.extend(["1", ":", "a"].map(|namespace| Key::new(namespace, "a").unwrap()));
    keys.sort();
    keys.dedup();
    let mut tokens = Vec::new();
    for key in &keys {
        let (token, granted) = client.lock(key).await;
        tokens.push(token);
        let state = client.inspect(key).await;
        assert_eq!(state.key, *key);
        assert_eq!(state.holders[0].fence, granted.fence);
    }
    let listed: Vec<Key> = client.list("").await.into_iter().map(|state| state.key).collect();
    let mut expected = keys.clone();
    expected.sort_by(|a, b| a.as_encoded().cmp(b.as_encoded()));
    assert_eq!(listed, expected);
    for (key, token) in keys.iter().zip(tokens) {
        client.release(key, token).await;
        assert!(!client.is_locked(key).await);
    }
}

pub async fn composed_and_decomposed_keys_are_equal<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    client.lock(&key("caf\u{e9}")).await;
    client.enqueue(&key("cafe\u{301}")).await;
}

pub async fn unknown_key_is_free_and_not_listed<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let state = client.inspect(&key("never")).await;
    assert_eq!((state.holders.len(), state.waiters.len(), state.closed_for), (0, 0, None));
    let (token, _) = client.lock(&key("past")).await;
    client.release(&key("past"), token).await;
    assert!(client.list("").await.is_empty(), "a released key is not listed");
}

pub async fn inspect_shows_holders_and_waiters<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let request = AcquireRequest {
        metadata: Some("nightly \u{1b}[2J 鍵".into()),
        trace: Some("billing.rs:42".into()),
        lifetime: Lifetime::Fixed(Duration::from_secs(60)),
        demand: Demand::new(2, 3).unwrap(),
        ..holder.request(&key("k"))
    };
    let granted = holder.expect_grant(&request).await;
    let waiting = AcquireRequest {
        metadata: Some("m".into()),
        trace: Some("t".into()),
        demand: Demand::new(3, 3).unwrap(),
        ..waiter.request(&key("k"))
    };
    waiter.expect_queued(&waiting).await;
    env.advance(Duration::from_millis(50)).await;
    let state = waiter.inspect(&key("k")).await;
    assert_eq!((state.capacity(), state.last_fence), (Some(3), Some(granted.fence)));
    let seen = &state.holders[0];
    assert_eq!((seen.fence, seen.units, seen.session_bound), (granted.fence, 2, false));
    assert_eq!((&seen.metadata, &seen.trace), (&request.metadata, &request.trace));
    assert_eq!(seen.owner, "somebody");
    assert!(seen.age >= Duration::from_millis(50) && seen.age < Duration::from_secs(30), "{:?}", seen.age);
    let remaining = seen.remaining.unwrap();
    assert!(remaining <= Duration::from_secs(60) - seen.age + Duration::from_millis(1), "{remaining:?}");
    let seen = &state.waiters[0];
    assert_eq!((seen.owner.as_str(), seen.units), ("somebody", 3));
    assert_eq!((seen.metadata.as_deref(), seen.trace.as_deref()), (Some("m"), Some("t")));
    assert!(seen.age >= Duration::from_millis(50));
    // A waiter keeps its metadata when it is granted.
    holder.release(&key("k"), request.token).await;
    let state = waiter.inspect(&key("k")).await;
    assert_eq!(state.holders[0].metadata.as_deref(), Some("m"));
    assert_eq!((state.holders[0].units, state.holders[0].remaining), (3, None));
}

pub async fn inspect_shows_no_token<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let waiting = waiter.enqueue(&key("k")).await;
    let shown = format!("{:?}", holder.inspect(&key("k")).await);
    for token in [token, waiting] {
        assert!(!shown.contains(&token.to_hex()));
    }
}

pub async fn list_selects_by_prefix_and_page<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    for i in 0..25 {
        client.lock(&key(&format!("a{i:02}"))).await;
    }
    for name in ["b", "a", "aa%", "a_"] {
        client.lock(&key(name)).await;
    }
    client.lock(&Key::new("other", "a00").unwrap()).await;
    let (pages, damaged) = read_pages(&client.store, ":a", 7).await;
    assert_eq!(damaged, []);
    let seen = Listing::merge(pages).keys;
    let seen: Vec<&str> = seen.iter().map(|state| state.key.name()).collect();
    let mut expected: Vec<String> =
        (0..25).map(|i| format!("a{i:02}")).chain(["a", "aa%", "a_"].map(str::to_owned)).collect();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(client.list("").await.len(), 30);
    assert!(client.list(":nothing").await.is_empty());
}

pub async fn ended_holds_are_not_listed<S: Store>(env: &Environment<S>) {
    let (dead, client) = (env.client().await, env.client().await);
    dead.lock(&key("dead")).await;
    let short = Lifetime::Fixed(Duration::from_secs(1));
    client.expect_grant(&AcquireRequest { lifetime: short, ..client.request(&key("expired")) }).await;
    let (token, _) = client.lock(&key("cooling")).await;
    client.store.release(&key("cooling"), token, Some(Duration::from_secs(1))).await.unwrap();
    client.lock(&key("held")).await;
    let names = async || -> Vec<String> {
        let listed = client.list("").await;
        listed.iter().map(|state| state.key.name().to_owned()).collect()
    };
    assert_eq!(names().await, ["cooling", "dead", "expired", "held"]);
    dead.store.close_session(dead.session).await.unwrap();
    env.advance(Duration::from_millis(1_050)).await;
    assert_eq!(names().await, ["held"]);
}
