//! scratch
#![allow(warnings, clippy::all, missing_docs)]
use std::time::Instant;
// usage: scripts URL spec...  each spec = file of "acquire ---- release ---- nkeys"
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let client = redis::Client::open(
        redis::IntoConnectionInfo::into_connection_info(args[1].as_str())
            .unwrap()
            .set_tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true)),
    )
    .unwrap();
    let options = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(1_024);
    let mut c = client.get_multiplexed_async_connection_with_config(&options).await.unwrap();
    let token = "0123456789abcdef0123456789abcdef";
    let asked = format!("99999999999999990{token}{token}S00000000");
    let keys = ["stanchion:{:k0}", "stanchion:{:k0}:queue", "stanchion:{:k0}:waiting"];
    let mut specs = vec![];
    let bare = redis::Script::new(
        "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0",
    );
    for f in &args[2..] {
        let t = std::fs::read_to_string(f).unwrap();
        let p: Vec<String> = t.split("\n----\n").map(|s| s.to_string()).collect();
        let a = redis::Script::new(&p[0]);
        let r = redis::Script::new(&p[1]);
        let n: usize = p[2].trim().parse().unwrap();
        for s in [&a, &r] {
            let _: String = redis::cmd("SCRIPT")
                .arg("LOAD")
                .arg(if std::ptr::eq(s, &a) { &p[0] } else { &p[1] })
                .query_async(&mut c)
                .await
                .unwrap();
        }
        specs.push((f.clone(), a.get_hash().to_string(), r.get_hash().to_string(), n));
    }
    let per = 400u32;
    let rounds = 120;
    let mut times: Vec<Vec<f64>> = vec![vec![]; specs.len() + 1];
    for round in 0..rounds {
        for t in 0..=specs.len() {
            let who = if round % 2 == 0 { t } else { specs.len() - t };
            let start = Instant::now();
            if who == 0 {
                for _ in 0..per {
                    let mut set = redis::cmd("SET");
                    set.arg("bare0").arg(token).arg("NX").arg("PX").arg(10_000);
                    let set: Option<String> = set.query_async(&mut c).await.unwrap();
                    assert!(set.is_some());
                    let d: u32 = bare.key("bare0").arg(token).invoke_async(&mut c).await.unwrap();
                    assert_eq!(d, 1);
                }
            } else {
                let (_, a, r, n) = &specs[who - 1];
                let _: () = redis::cmd("DEL").arg(&keys[0]).query_async(&mut c).await.unwrap();
                for _ in 0..per {
                    let mut q = redis::Cmd::with_capacity(8, 512);
                    q.arg("EVALSHA").arg(a).arg(*n).arg(&keys[..*n]).arg(&asked);
                    let f: String = q.query_async(&mut c).await.unwrap();
                    assert!(f.len() >= 16);
                    let mut q = redis::Cmd::with_capacity(8, 512);
                    q.arg("EVALSHA").arg(r).arg(*n).arg(&keys[..*n]).arg(token);
                    let f: Option<String> = q.query_async(&mut c).await.unwrap();
                    assert!(f.is_some());
                }
            }
            times[who].push(start.elapsed().as_secs_f64() * 1e6 / per as f64);
        }
    }
    let med = |v: &mut Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let b = med(&mut times[0].clone());
    for (i, t) in times.iter().enumerate() {
        // paired ratio per round
        let mut ratios: Vec<f64> = t.iter().zip(&times[0]).map(|(x, b)| b / x).collect();
        println!(
            "{:30} {:.1} us  ratio of medians {:.3}  paired {:.3}",
            if i == 0 { "bare" } else { &specs[i - 1].0 },
            med(&mut t.clone()),
            b / med(&mut t.clone()),
            med(&mut ratios)
        );
    }
}
