//! Keys of any content, and what can be seen of them.

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
    let actor = env.actor().await;
    let mut keys: Vec<Key> = odd_names().iter().map(|name| key(name)).collect();
    keys.extend(["1", ":", "a"].map(|namespace| Key::new(namespace, "a").unwrap()));
    keys.sort();
    keys.dedup();
    let mut tokens = Vec::new();
    for key in &keys {
        let (token, granted) = actor.takes(key).await;
        tokens.push(token);
        let state = actor.sees(key).await;
        assert_eq!(state.key, *key);
        assert_eq!(state.holders[0].fence, granted.fence);
    }
    let listed: Vec<Key> = actor.lists("").await.into_iter().map(|state| state.key).collect();
    let mut expected = keys.clone();
    expected.sort_by(|a, b| a.as_encoded().cmp(b.as_encoded()));
    assert_eq!(listed, expected);
    for (key, token) in keys.iter().zip(tokens) {
        actor.releases(key, token).await;
        assert!(!actor.sees_held(key).await);
    }
}

pub async fn composed_and_decomposed_keys_are_equal<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    actor.takes(&key("caf\u{e9}")).await;
    actor.queues(&key("cafe\u{301}")).await;
}

pub async fn unknown_key_is_free_and_not_listed<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let state = actor.sees(&key("never")).await;
    assert_eq!((state.holders.len(), state.waiters.len(), state.closed_for), (0, 0, None));
    let (token, _) = actor.takes(&key("past")).await;
    actor.releases(&key("past"), token).await;
    assert!(actor.lists("").await.is_empty(), "only what is held, waited for or closed");
}

pub async fn inspect_shows_holders_and_waiters<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let request = AcquireRequest {
        metadata: Some("nightly \u{1b}[2J 鍵".into()),
        trace: Some("billing.rs:42".into()),
        lifetime: Lifetime::Fixed(Duration::from_secs(60)),
        demand: Demand::new(2, 3).unwrap(),
        ..holder.request(&key("k"))
    };
    let granted = holder.gets(&request).await;
    let waiting = AcquireRequest {
        metadata: Some("m".into()),
        trace: Some("t".into()),
        demand: Demand::new(3, 3).unwrap(),
        ..waiter.request(&key("k"))
    };
    waiter.waits(&waiting).await;
    env.pass(Duration::from_millis(50)).await;
    let state = waiter.sees(&key("k")).await;
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
    // The waiter keeps its text when it is granted.
    holder.releases(&key("k"), request.token).await;
    let state = waiter.sees(&key("k")).await;
    assert_eq!(state.holders[0].metadata.as_deref(), Some("m"));
    assert_eq!((state.holders[0].units, state.holders[0].remaining), (3, None));
}

pub async fn inspect_shows_no_token<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let waiting = waiter.queues(&key("k")).await;
    let shown = format!("{:?}", holder.sees(&key("k")).await);
    for token in [token, waiting] {
        assert!(!shown.contains(&token.to_hex()));
    }
}

pub async fn list_selects_by_prefix_and_page<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    for i in 0..25 {
        actor.takes(&key(&format!("a{i:02}"))).await;
    }
    for name in ["b", "a", "aa%", "a_"] {
        actor.takes(&key(name)).await;
    }
    actor.takes(&Key::new("other", "a00").unwrap()).await;
    let (pages, damaged) = read_pages(&actor.store, ":a", 7).await;
    assert_eq!(damaged, []);
    let seen = Listing::merge(pages).keys;
    let seen: Vec<&str> = seen.iter().map(|state| state.key.name()).collect();
    let mut expected: Vec<String> =
        (0..25).map(|i| format!("a{i:02}")).chain(["a", "aa%", "a_"].map(str::to_owned)).collect();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(actor.lists("").await.len(), 30);
    assert!(actor.lists(":nothing").await.is_empty());
}

pub async fn ended_holds_are_not_listed<S: Store>(env: &Environment<S>) {
    let (dead, actor) = (env.actor().await, env.actor().await);
    dead.takes(&key("dead")).await;
    let short = Lifetime::Fixed(Duration::from_secs(1));
    actor.gets(&AcquireRequest { lifetime: short, ..actor.request(&key("expired")) }).await;
    let (token, _) = actor.takes(&key("cooling")).await;
    actor.store.release(&key("cooling"), token, Some(Duration::from_secs(1))).await.unwrap();
    actor.takes(&key("held")).await;
    let names = async || -> Vec<String> {
        let listed = actor.lists("").await;
        listed.iter().map(|state| state.key.name().to_owned()).collect()
    };
    assert_eq!(names().await, ["cooling", "dead", "expired", "held"]);
    dead.store.close_session(dead.session).await.unwrap();
    env.pass(Duration::from_millis(1_050)).await;
    assert_eq!(names().await, ["held"]);
}
