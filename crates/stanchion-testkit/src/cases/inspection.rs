//! Inspecting and listing keys, including keys whose names look like internal ones.

use std::time::Duration;

use stanchion::store::{AcquireRequest, Demand, KeyState, Lifetime, Listing};
use stanchion::{Key, Store};

use crate::environment::{Client, Environment, key, list_all, read_pages, until};

const SHORT: Duration = Duration::from_secs(2);

async fn listed_names<S: Store>(client: &Client<S>, prefix: &str) -> Vec<String> {
    client.list(prefix).await.iter().map(|state| state.key.name().to_owned()).collect()
}

pub async fn inspect_and_list_change_nothing<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    let waiting = waiter.enqueue(&key("k")).await;
    for _ in 0..5 {
        waiter.inspect(&key("k")).await;
        waiter.inspect(&key("never")).await;
        listed_names(&waiter, "").await;
    }
    assert_eq!(listed_names(&waiter, "").await, ["k"]);
    assert_eq!(holder.current_grant(&key("k"), token).await, Some(granted));
    holder.release(&key("k"), token).await;
    assert!(waiter.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn observers_see_the_same_state<S: Store>(env: &Environment<S>) {
    let (holder, one, two) = (env.client().await, env.client().await, env.client().await);
    let (_, granted) = holder.lock(&key("k")).await;
    one.enqueue(&key("k")).await;
    let constant_part = |state: KeyState| {
        let fences: Vec<_> = state.holders.iter().map(|holder| (holder.fence, holder.since)).collect();
        (state.key.clone(), state.capacity(), fences, state.waiters.len(), state.last_fence)
    };
    let (a, b) = (one.inspect(&key("k")).await, two.inspect(&key("k")).await);
    assert_eq!(a.last_fence, Some(granted.fence));
    let listed = two.list("").await.remove(0);
    assert_eq!(constant_part(a), constant_part(b.clone()), "two handles see different states");
    assert_eq!(constant_part(b), constant_part(listed), "inspect and list show different states");
}

pub async fn inspect_lists_waiters_in_order<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    client.lock(&key("k")).await;
    let texts: Vec<String> = (0..12).map(|i| format!("waiter {i}")).collect();
    for text in &texts {
        client.expect_queued(&AcquireRequest { metadata: Some(text.clone()), ..client.request(&key("k")) }).await;
    }
    let seen: Vec<String> =
        client.inspect(&key("k")).await.waiters.into_iter().map(|waiter| waiter.metadata.unwrap()).collect();
    assert_eq!(seen, texts);
}

pub async fn longest_texts_are_kept<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let metadata = Some("é\n\"'\\%{}".repeat(409));
    let trace = Some("\u{1b}".repeat(4_096));
    let request = holder.request(&key("k"));
    let (mut held, mut waits) = (request.clone(), waiter.request(&key("k")));
    (held.metadata, held.trace) = (metadata.clone(), trace.clone());
    (waits.metadata, waits.trace) = (metadata.clone(), trace.clone());
    holder.expect_grant(&held).await;
    waiter.expect_queued(&waits).await;
    let state = holder.inspect(&key("k")).await;
    assert_eq!((&state.holders[0].metadata, &state.holders[0].trace), (&metadata, &trace));
    assert_eq!((&state.waiters[0].metadata, &state.waiters[0].trace), (&metadata, &trace));
    let (token, _) = holder.lock(&key("none")).await;
    let state = holder.inspect(&key("none")).await;
    assert_eq!(
        (&state.holders[0].metadata, &state.holders[0].trace),
        (&None, &None),
        "an absent text is stored as an empty one"
    );
    holder.release(&key("none"), token).await;
}

pub async fn age_grows_and_since_stays<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    client.lock(&key("k")).await;
    let before = client.inspect(&key("k")).await.holders.remove(0);
    env.advance(SHORT).await;
    let after = client.inspect(&key("k")).await.holders.remove(0);
    assert!(after.age >= before.age + SHORT);
    assert_eq!(after.since, before.since);
}

pub async fn closed_keys_are_listed<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, _) = client.lock(&key("closed")).await;
    client.store.release(&key("closed"), token, Some(Duration::from_secs(60))).await.unwrap();
    let (token, _) = client.lock(&key("waited")).await;
    client.store.release(&key("waited"), token, Some(Duration::from_secs(60))).await.unwrap();
    client.enqueue(&key("waited")).await;
    let page = client.list("").await;
    let seen: Vec<_> = page.iter().map(|state| (state.key.name(), state.holders.len(), state.waiters.len())).collect();
    assert_eq!(seen, [("closed", 0, 0), ("waited", 0, 1)]);
    assert!(page.iter().all(|state| state.closed_for.is_some()));
}

pub async fn prefix_is_matched_literally<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let names =
        ["%", "%a", "_", "_a", "*", "*a", "?a", "[a]", "a", "A", "ab", "Ab", "\\%", "\\a", "é", "éa", "e", "''"];
    for name in names {
        client.lock(&key(name)).await;
    }
    for prefix in ["%", "_", "*", "?", "[", "[a]", "a", "A", "ab", "\\", "\\%", "é", "e", "'", "''", "%%", "a%", "__"]
    {
        let mut expected: Vec<&str> = names.into_iter().filter(|name| name.starts_with(prefix)).collect();
        expected.sort_unstable();
        assert_eq!(listed_names(&client, &format!(":{prefix}")).await, expected, "{prefix}");
    }
}

pub async fn pages_return_every_key_once<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut names: Vec<String> = (0..23).map(|i| format!("{}k{}", if i % 3 == 0 { "é" } else { "" }, i)).collect();
    for name in &names {
        client.lock(&key(name)).await;
    }
    names.sort();
    for size in [0, 1, 2, 7, 22, 23, 24, 1_000] {
        let (pages, damaged) = read_pages(&client.store, "", size).await;
        assert_eq!(damaged, []);
        // A page may exceed its size, but not without bound.
        assert!(pages.iter().all(|page| page.keys.len() <= size + 1_000));
        let seen = Listing::merge(pages).keys;
        assert_eq!(seen.iter().map(|state| state.key.name()).collect::<Vec<_>>(), names, "pages of {size}");
    }
}

pub async fn empty_pages_lead_to_the_next<S: Store>(env: &Environment<S>) {
    let (client, dead) = (env.client().await, env.client().await);
    for i in 0..60 {
        dead.lock(&key(&format!("dead {i:02}"))).await;
        let (token, _) = client.lock(&key(&format!("idle {i:02}"))).await;
        client.release(&key(&format!("idle {i:02}")), token).await;
    }
    client.lock(&key("a first one")).await;
    client.lock(&key("z last one")).await;
    dead.store.close_session(dead.session).await.unwrap();
    for size in [1, 4, 1_000] {
        let (pages, _) = read_pages(&client.store, "", size).await;
        let seen = Listing::merge(pages).keys;
        let names: Vec<_> = seen.iter().map(|state| state.key.name()).collect();
        assert_eq!(names, ["a first one", "z last one"], "pages of {size}");
    }
}

pub async fn paging_survives_concurrent_changes<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut tokens = Vec::new();
    for i in 0..120 {
        tokens.push(client.lock(&key(&format!("k{i:03}"))).await.0);
    }
    let mut pages: Vec<Listing> = Vec::new();
    for round in 0.. {
        // Releases every third key and locks new ones. Every key that stays must be listed.
        if let Some(token) = tokens.get(3 * round) {
            client.release(&key(&format!("k{:03}", 3 * round)), *token).await;
            client.lock(&key(&format!("n{round:03}"))).await;
        }
        let cursor = pages.last().and_then(|page| page.next.as_ref());
        pages.push(client.store.list(":", cursor, 5).await.unwrap().outcome);
        if pages.last().is_some_and(|page| page.next.is_none()) {
            break;
        }
    }
    let seen = Listing::merge(pages).keys;
    let seen: Vec<_> = seen.iter().map(|state| state.key.name()).collect();
    for i in (0..120).filter(|i| i % 3 > 0) {
        assert!(seen.contains(&&*format!("k{i:03}")), "{i}");
    }
}

pub async fn list_omits_ended_holds_and_waiters<S: Store>(env: &Environment<S>) {
    let (holder, waiter, dead) =
        (env.client().await, env.client().await, env.client_with_ttl(Duration::from_secs(3)).await);
    dead.lock(&key("held by the dead")).await;
    holder.lock(&key("waited for by the dead")).await;
    dead.enqueue(&key("waited for by the dead")).await;
    let read = AcquireRequest { demand: Demand::READ, ..holder.request(&key("read by both")) };
    holder.expect_grant(&read).await;
    dead.expect_grant(&AcquireRequest { demand: Demand::READ, ..dead.request(&key("read by both")) }).await;
    let short = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&key("short")) };
    holder.expect_grant(&short).await;
    assert_eq!(waiter.list("").await.len(), 4);
    env.kill(dead).await;
    env.advance(SHORT).await;
    let seen = waiter.list("").await;
    let seen: Vec<_> = seen.iter().map(|state| (state.key.name(), state.holders.len(), state.waiters.len())).collect();
    assert_eq!(seen, [("read by both", 1, 0), ("waited for by the dead", 1, 0)]);
}

pub async fn namespaces_and_names_never_mix<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let keys = [("", "ab"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("", "1:ab"), ("", "a:b"), ("1:a", "b")];
    let keys = keys.map(|(namespace, name)| Key::new(namespace, name).unwrap());
    for key in &keys {
        client.lock(key).await;
    }
    for key in &keys {
        let state = client.inspect(key).await;
        assert_eq!((state.holders.len(), state.key.namespace()), (1, key.namespace()));
    }
    assert_eq!(listed_names(&client, "1:a").await, ["b", "bc"]);
    assert_eq!(listed_names(&client, ":").await, ["1:ab", "a:b", "ab"]);
}

pub async fn internal_looking_names_are_plain_keys<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut names: Vec<String> = [
        "keys",
        "holds",
        "waiters",
        "forced",
        "meta",
        "sqlite_master",
        "rowid",
        "lock",
        "store.db",
        "db",
        "gate",
        "sessions/x.lock",
        "fence_floor",
        ":fence",
        ":queue",
        "k:fence",
        "k:queue",
        "k:holds",
        "k/0",
        "stanchion",
        "stanchion:k",
        "session:1",
        "__all__",
        "con",
        "nul",
        "aux",
        "-",
        "--help",
        "~",
        "$HOME",
        "${x}",
        "0x0",
        "1e9",
        "true",
        "undefined",
    ]
    .map(str::to_owned)
    .into();
    // Names that equal the ids of a session and of a token.
    names.push(client.session.to_hex());
    names.push(format!("{}.lock", client.session.to_hex()));
    let (token, _) = client.lock(&key("k")).await;
    names.push(token.to_hex());
    for name in &names {
        let (token, granted) = client.lock(&key(name)).await;
        assert_eq!(client.inspect(&key(name)).await.holders[0].fence, granted.fence, "{name}");
        client.enqueue(&key(name)).await;
        assert_eq!(client.inspect(&key(name)).await.waiters.len(), 1, "{name}");
        assert!(client.current_grant(&key(name), token).await.is_some(), "{name}");
    }
    assert!(client.current_grant(&key("k"), token).await.is_some());
    assert_eq!(listed_names(&client, "").await.len(), names.len() + 1);
}

pub async fn longest_key_supports_every_operation<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    // Two keys that differ only in the last byte.
    let stem = "k".repeat(stanchion::MAX_KEY_BYTES - 1);
    let namespace = "n".repeat(128);
    let [one, two] = ["1", "2"].map(|end| Key::new(&namespace, &format!("{stem}{end}")).unwrap());
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&one) };
    let granted = holder.expect_grant(&request).await;
    let (token, _) = holder.lock(&two).await;
    let waiting = waiter.enqueue(&one).await;
    holder.store.extend(&one, request.token, Duration::from_secs(60)).await.unwrap();
    assert!(holder.current_grant(&two, token).await.is_some());
    holder.release(&one, request.token).await;
    assert!(waiter.current_grant(&one, waiting).await.unwrap().fence > granted.fence);
    assert_eq!(waiter.inspect(&one).await.key, one);
    assert_eq!(holder.list(two.as_encoded()).await[0].key, two);
}

pub async fn fence_text_sorts_like_fences<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut last = String::new();
    for _ in 0..20 {
        let (token, granted) = client.lock(&key("k")).await;
        let text = granted.fence.to_string();
        assert!(text > last, "{last}, then {text}");
        assert_eq!(text.parse::<stanchion::Fence>().unwrap(), granted.fence);
        last = text;
        client.release(&key("k"), token).await;
    }
}

pub async fn fences_of_keys_are_independent<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (_, quiet) = client.lock(&key("quiet")).await;
    for _ in 0..50 {
        let (token, _) = client.lock(&key("busy")).await;
        client.release(&key("busy"), token).await;
    }
    assert_eq!(client.inspect(&key("quiet")).await.last_fence, Some(quiet.fence));
    assert_eq!(client.inspect(&key("quiet")).await.holders[0].fence, quiet.fence);
}

pub async fn second_handle_sees_changes_at_once<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.client().await, env.open());
    let (token, granted) = one.lock(&key("k")).await;
    let seen = two.inspect(&key("k")).await.unwrap().outcome;
    assert_eq!(seen.holders[0].fence, granted.fence, "the second handle sees the grant at once");
    assert_eq!(list_all(&two, "").await.len(), 1);
    one.release(&key("k"), token).await;
    assert!(two.inspect(&key("k")).await.unwrap().outcome.holders.is_empty());
    until("the list is empty", async || list_all(&two, "").await.is_empty()).await;
}
