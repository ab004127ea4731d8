//! What is seen from outside, and names that look like something else.

use std::time::Duration;

use stanchion::store::{AcquireRequest, Demand, KeyState, Lifetime, Listing};
use stanchion::{Key, Store};

use crate::environment::{Actor, Environment, key, list_all, read_pages, until};

const SHORT: Duration = Duration::from_secs(2);

async fn listed<S: Store>(actor: &Actor<S>, prefix: &str) -> Vec<String> {
    actor.lists(prefix).await.iter().map(|state| state.key.name().to_owned()).collect()
}

pub async fn inspect_and_list_change_nothing<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    let waiting = waiter.queues(&key("k")).await;
    for _ in 0..5 {
        waiter.sees(&key("k")).await;
        waiter.sees(&key("never")).await;
        listed(&waiter, "").await;
    }
    assert_eq!(listed(&waiter, "").await, ["k"]);
    assert_eq!(holder.granted(&key("k"), token).await, Some(granted));
    holder.releases(&key("k"), token).await;
    assert!(waiter.granted(&key("k"), waiting).await.is_some());
}

pub async fn observers_see_the_same_state<S: Store>(env: &Environment<S>) {
    let (holder, one, two) = (env.actor().await, env.actor().await, env.actor().await);
    let (_, granted) = holder.takes(&key("k")).await;
    one.queues(&key("k")).await;
    let still = |state: KeyState| {
        let fences: Vec<_> = state.holders.iter().map(|holder| (holder.fence, holder.since)).collect();
        (state.key.clone(), state.capacity(), fences, state.waiters.len(), state.last_fence)
    };
    let (a, b) = (one.sees(&key("k")).await, two.sees(&key("k")).await);
    assert_eq!(a.last_fence, Some(granted.fence));
    let listed = two.lists("").await.remove(0);
    assert_eq!(still(a), still(b.clone()), "through two handles");
    assert_eq!(still(b), still(listed), "inspected and listed");
}

pub async fn inspect_lists_waiters_in_order<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    actor.takes(&key("k")).await;
    let texts: Vec<String> = (0..12).map(|i| format!("waiter {i}")).collect();
    for text in &texts {
        actor.waits(&AcquireRequest { metadata: Some(text.clone()), ..actor.request(&key("k")) }).await;
    }
    let seen: Vec<String> =
        actor.sees(&key("k")).await.waiters.into_iter().map(|waiter| waiter.metadata.unwrap()).collect();
    assert_eq!(seen, texts);
}

pub async fn longest_texts_are_kept<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let metadata = Some("é\n\"'\\%{}".repeat(409));
    let trace = Some("\u{1b}".repeat(4_096));
    let request = holder.request(&key("k"));
    let (mut held, mut waits) = (request.clone(), waiter.request(&key("k")));
    (held.metadata, held.trace) = (metadata.clone(), trace.clone());
    (waits.metadata, waits.trace) = (metadata.clone(), trace.clone());
    holder.gets(&held).await;
    waiter.waits(&waits).await;
    let state = holder.sees(&key("k")).await;
    assert_eq!((&state.holders[0].metadata, &state.holders[0].trace), (&metadata, &trace));
    assert_eq!((&state.waiters[0].metadata, &state.waiters[0].trace), (&metadata, &trace));
    let (token, _) = holder.takes(&key("none")).await;
    let state = holder.sees(&key("none")).await;
    assert_eq!((&state.holders[0].metadata, &state.holders[0].trace), (&None, &None), "nothing is not empty");
    holder.releases(&key("none"), token).await;
}

pub async fn age_grows_and_since_stays<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    actor.takes(&key("k")).await;
    let before = actor.sees(&key("k")).await.holders.remove(0);
    env.pass(SHORT).await;
    let after = actor.sees(&key("k")).await.holders.remove(0);
    assert!(after.age >= before.age + SHORT);
    assert_eq!(after.since, before.since);
}

pub async fn closed_keys_are_listed<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, _) = actor.takes(&key("closed")).await;
    actor.store.release(&key("closed"), token, Some(Duration::from_secs(60))).await.unwrap();
    let (token, _) = actor.takes(&key("waited")).await;
    actor.store.release(&key("waited"), token, Some(Duration::from_secs(60))).await.unwrap();
    actor.queues(&key("waited")).await;
    let page = actor.lists("").await;
    let seen: Vec<_> = page.iter().map(|state| (state.key.name(), state.holders.len(), state.waiters.len())).collect();
    assert_eq!(seen, [("closed", 0, 0), ("waited", 0, 1)]);
    assert!(page.iter().all(|state| state.closed_for.is_some()));
}

pub async fn prefix_is_matched_literally<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let names =
        ["%", "%a", "_", "_a", "*", "*a", "?a", "[a]", "a", "A", "ab", "Ab", "\\%", "\\a", "é", "éa", "e", "''"];
    for name in names {
        actor.takes(&key(name)).await;
    }
    for prefix in ["%", "_", "*", "?", "[", "[a]", "a", "A", "ab", "\\", "\\%", "é", "e", "'", "''", "%%", "a%", "__"]
    {
        let mut expected: Vec<&str> = names.into_iter().filter(|name| name.starts_with(prefix)).collect();
        expected.sort_unstable();
        assert_eq!(listed(&actor, &format!(":{prefix}")).await, expected, "{prefix}");
    }
}

pub async fn pages_return_every_key_once<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut names: Vec<String> = (0..23).map(|i| format!("{}k{}", if i % 3 == 0 { "é" } else { "" }, i)).collect();
    for name in &names {
        actor.takes(&key(name)).await;
    }
    names.sort();
    for size in [0, 1, 2, 7, 22, 23, 24, 1_000] {
        let (pages, damaged) = read_pages(&actor.store, "", size).await;
        assert_eq!(damaged, []);
        // One that has more than a few keys too many is not bounded.
        assert!(pages.iter().all(|page| page.keys.len() <= size + 1_000));
        let seen = Listing::merge(pages).keys;
        assert_eq!(seen.iter().map(|state| state.key.name()).collect::<Vec<_>>(), names, "pages of {size}");
    }
}

pub async fn empty_pages_lead_to_the_next<S: Store>(env: &Environment<S>) {
    let (actor, dead) = (env.actor().await, env.actor().await);
    for i in 0..60 {
        dead.takes(&key(&format!("dead {i:02}"))).await;
        let (token, _) = actor.takes(&key(&format!("idle {i:02}"))).await;
        actor.releases(&key(&format!("idle {i:02}")), token).await;
    }
    actor.takes(&key("a first one")).await;
    actor.takes(&key("z last one")).await;
    dead.store.close_session(dead.session).await.unwrap();
    for size in [1, 4, 1_000] {
        let (pages, _) = read_pages(&actor.store, "", size).await;
        let seen = Listing::merge(pages).keys;
        let names: Vec<_> = seen.iter().map(|state| state.key.name()).collect();
        assert_eq!(names, ["a first one", "z last one"], "pages of {size}");
    }
}

pub async fn paging_survives_concurrent_changes<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut tokens = Vec::new();
    for i in 0..120 {
        tokens.push(actor.takes(&key(&format!("k{i:03}"))).await.0);
    }
    let mut pages: Vec<Listing> = Vec::new();
    for round in 0.. {
        // Every third one goes, and others come: what stays is listed all the same.
        if let Some(token) = tokens.get(3 * round) {
            actor.releases(&key(&format!("k{:03}", 3 * round)), *token).await;
            actor.takes(&key(&format!("n{round:03}"))).await;
        }
        let cursor = pages.last().and_then(|page| page.next.as_ref());
        pages.push(actor.store.list(":", cursor, 5).await.unwrap().outcome);
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
    let (holder, waiter, dead) = (env.actor().await, env.actor().await, env.mortal(Duration::from_secs(3)).await);
    dead.takes(&key("held by the dead")).await;
    holder.takes(&key("waited for by the dead")).await;
    dead.queues(&key("waited for by the dead")).await;
    let read = AcquireRequest { demand: Demand::READ, ..holder.request(&key("read by both")) };
    holder.gets(&read).await;
    dead.gets(&AcquireRequest { demand: Demand::READ, ..dead.request(&key("read by both")) }).await;
    let short = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&key("short")) };
    holder.gets(&short).await;
    assert_eq!(waiter.lists("").await.len(), 4);
    env.dies(dead).await;
    env.pass(SHORT).await;
    let seen = waiter.lists("").await;
    let seen: Vec<_> = seen.iter().map(|state| (state.key.name(), state.holders.len(), state.waiters.len())).collect();
    assert_eq!(seen, [("read by both", 1, 0), ("waited for by the dead", 1, 0)]);
}

pub async fn namespaces_and_names_never_mix<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let keys = [("", "ab"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("", "1:ab"), ("", "a:b"), ("1:a", "b")];
    let keys = keys.map(|(namespace, name)| Key::new(namespace, name).unwrap());
    for key in &keys {
        actor.takes(key).await;
    }
    for key in &keys {
        let state = actor.sees(key).await;
        assert_eq!((state.holders.len(), state.key.namespace()), (1, key.namespace()));
    }
    assert_eq!(listed(&actor, "1:a").await, ["b", "bc"]);
    assert_eq!(listed(&actor, ":").await, ["1:ab", "a:b", "ab"]);
}

pub async fn internal_looking_names_are_plain_keys<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
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
    // A session's and a token's own text.
    names.push(actor.session.to_hex());
    names.push(format!("{}.lock", actor.session.to_hex()));
    let (token, _) = actor.takes(&key("k")).await;
    names.push(token.to_hex());
    for name in &names {
        let (token, granted) = actor.takes(&key(name)).await;
        assert_eq!(actor.sees(&key(name)).await.holders[0].fence, granted.fence, "{name}");
        actor.queues(&key(name)).await;
        assert_eq!(actor.sees(&key(name)).await.waiters.len(), 1, "{name}");
        assert!(actor.granted(&key(name), token).await.is_some(), "{name}");
    }
    assert!(actor.granted(&key("k"), token).await.is_some());
    assert_eq!(listed(&actor, "").await.len(), names.len() + 1);
}

pub async fn longest_key_supports_every_operation<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    // Two that differ in the last byte alone.
    let stem = "k".repeat(stanchion::MAX_KEY_BYTES - 1);
    let namespace = "n".repeat(128);
    let [one, two] = ["1", "2"].map(|end| Key::new(&namespace, &format!("{stem}{end}")).unwrap());
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&one) };
    let granted = holder.gets(&request).await;
    let (token, _) = holder.takes(&two).await;
    let waiting = waiter.queues(&one).await;
    holder.store.extend(&one, request.token, Duration::from_secs(60)).await.unwrap();
    assert!(holder.granted(&two, token).await.is_some());
    holder.releases(&one, request.token).await;
    assert!(waiter.granted(&one, waiting).await.unwrap().fence > granted.fence);
    assert_eq!(waiter.sees(&one).await.key, one);
    assert_eq!(holder.lists(two.as_encoded()).await[0].key, two);
}

pub async fn fence_text_sorts_like_fences<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut last = String::new();
    for _ in 0..20 {
        let (token, granted) = actor.takes(&key("k")).await;
        let text = granted.fence.to_string();
        assert!(text > last, "{last}, then {text}");
        assert_eq!(text.parse::<stanchion::Fence>().unwrap(), granted.fence);
        last = text;
        actor.releases(&key("k"), token).await;
    }
}

pub async fn fences_of_keys_are_independent<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (_, quiet) = actor.takes(&key("quiet")).await;
    for _ in 0..50 {
        let (token, _) = actor.takes(&key("busy")).await;
        actor.releases(&key("busy"), token).await;
    }
    assert_eq!(actor.sees(&key("quiet")).await.last_fence, Some(quiet.fence));
    assert_eq!(actor.sees(&key("quiet")).await.holders[0].fence, quiet.fence);
}

pub async fn second_handle_sees_changes_at_once<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.actor().await, env.open());
    let (token, granted) = one.takes(&key("k")).await;
    let seen = two.inspect(&key("k")).await.unwrap().outcome;
    assert_eq!(seen.holders[0].fence, granted.fence, "as soon as it was answered");
    assert_eq!(list_all(&two, "").await.len(), 1);
    one.releases(&key("k"), token).await;
    assert!(two.inspect(&key("k")).await.unwrap().outcome.holders.is_empty());
    until("nothing is left", async || list_all(&two, "").await.is_empty()).await;
}
