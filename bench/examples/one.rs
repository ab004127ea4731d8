//! scratch
#![allow(warnings, clippy::all, missing_docs)]
use std::time::Instant;
fn main() {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let args: Vec<String> = std::env::args().collect();
    let n: u32 = args[3].parse().unwrap();
    rt.block_on(async {
        let url = args[2].clone();
        match args[1].as_str() {
            "ours" => {
                let locks = stanchion::Locks::open(&url).await.unwrap();
                tokio::spawn(async move {
                    for _ in 0..200 {
                        locks.lock("k0".to_string()).await.unwrap().release().await.unwrap();
                    }
                    let s = Instant::now();
                    for _ in 0..n {
                        locks.lock("k0".to_string()).await.unwrap().release().await.unwrap();
                    }
                    println!("{:.2} us a pair", s.elapsed().as_secs_f64() * 1e6 / n as f64);
                })
                .await
                .unwrap();
            }
            _ => {
                let client = redis::Client::open(
                    redis::IntoConnectionInfo::into_connection_info(url.as_str())
                        .unwrap()
                        .set_tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true)),
                )
                .unwrap();
                let options = redis::AsyncConnectionConfig::new();
                let options = if args[1] == "bare" {
                    options.set_response_timeout(None).set_pipeline_buffer_size(1_024)
                } else {
                    options
                };
                let mut c = client.get_multiplexed_async_connection_with_config(&options).await.unwrap();
                let script = redis::Script::new(
                    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0",
                );
                let token = "0123456789abcdef0123456789abcdef";
                tokio::spawn(async move {
                    let mut s = Instant::now();
                    for i in 0..n + 200 {
                        if i == 200 {
                            s = Instant::now();
                        }
                        let mut set = redis::cmd("SET");
                        set.arg("bare0").arg(token).arg("NX").arg("PX").arg(10_000);
                        let set: Option<String> = set.query_async(&mut c).await.unwrap();
                        assert!(set.is_some());
                        let d: u32 = script.key("bare0").arg(token).invoke_async(&mut c).await.unwrap();
                        assert_eq!(d, 1);
                    }
                    println!("{:.2} us a pair", s.elapsed().as_secs_f64() * 1e6 / n as f64);
                })
                .await
                .unwrap();
            }
        }
    });
}
