//! The network between router and workers loses, delays, breaks or lies.

use std::io::Write as _;
use std::time::Duration;

use muster_testkit::proxy::{FaultProxy, Weather};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::disturbed::{disturbed, metric, replicated};
use muster_tests::liar::{Liar, Lie};
use muster_tests::network::Network;
use muster_tests::process::eventually;

/// A cluster with a proxy in front of every worker.
async fn behind_proxies(setup: Setup) -> (Cluster, Vec<FaultProxy>) {
    let mut proxies = Vec::new();
    let cluster = Cluster::start_through(setup.tcp(), async |workers| {
        for worker in &workers {
            proxies.push(FaultProxy::start(worker).await.expect("a proxy"));
        }
        proxies.iter().map(FaultProxy::address).collect()
    })
    .await;
    (cluster, proxies)
}

async fn lost_links(cluster: &Cluster, count: f64) {
    eventually("a link is found dead", async || {
        (metric(cluster, "muster_dispatch_links_lost_total") >= count).then_some(())
    })
    .await;
}

async fn connected(cluster: &Cluster, workers: f64) {
    eventually("workers are connected", async || {
        (metric(cluster, "muster_dispatch_workers") == workers).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_hole_with_replicas_is_not_noticed_and_found() {
    let (mut cluster, proxies) = behind_proxies(replicated()).await;
    let hole = &proxies[1];
    disturbed("black-holed link, replicas exist", &mut cluster, async |_| {
        hole.set(Weather::BlackHole);
        eventually("something is lost", async || (hole.counts().dropped_bytes > 0).then_some(())).await;
    })
    .await;
    assert!(metric(&cluster, "muster_dispatch_resent_shards_total") > 0.0, "its rows went to others");
    lost_links(&cluster, 1.0).await;
    connected(&cluster, 2.0).await;
    hole.set(Weather::Fair);
    connected(&cluster, 3.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_wait_while_the_only_holder_is_behind_a_black_hole() {
    let (mut cluster, proxies) = behind_proxies(Setup::new(&demo_model())).await;
    let hole = &proxies[1];
    disturbed("black-holed link of the only holder, until found dead", &mut cluster, async |cluster| {
        hole.set(Weather::BlackHole);
        lost_links(cluster, 1.0).await;
        assert!(hole.counts().dropped_bytes > 0);
        // A connection that lost bytes carries nothing more: only a new one can.
        hole.set(Weather::Fair);
    })
    .await;
    assert!(hole.counts().connections > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_link_is_stood_in_for_and_goes_on() {
    let (mut cluster, proxies) = behind_proxies(replicated()).await;
    let frozen = &proxies[2];
    disturbed("frozen link, replicas exist", &mut cluster, async |cluster| {
        frozen.set(Weather::Frozen);
        eventually("others are asked", async || {
            (metric(cluster, "muster_dispatch_resent_shards_total") > 0.0).then_some(())
        })
        .await;
        assert!(frozen.counts().frozen > 0);
        frozen.set(Weather::Fair);
        eventually("late replies are dropped", async || {
            (metric(cluster, "muster_dispatch_late_replies_total") > 0.0).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_connection_with_replicas_is_not_noticed() {
    let (mut cluster, proxies) = behind_proxies(replicated()).await;
    disturbed("reset connections, one worker after another, replicas exist", &mut cluster, async |cluster| {
        for proxy in &proxies {
            connected(cluster, 3.0).await;
            proxy.reset();
            eventually("it is reset", async || (proxy.counts().resets > 0).then_some(())).await;
        }
    })
    .await;
    lost_links(&cluster, 3.0).await;
    connected(&cluster, 3.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_wait_for_connections_that_were_all_reset() {
    let (mut cluster, proxies) = behind_proxies(Setup::new(&demo_model())).await;
    disturbed("all connections reset at once, no replicas", &mut cluster, async |cluster| {
        for proxy in &proxies {
            proxy.reset();
        }
        lost_links(cluster, 2.0).await;
    })
    .await;
    assert!(proxies.iter().all(|proxy| proxy.counts().resets > 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn jitter_on_every_link_changes_no_token() {
    let (mut cluster, proxies) = behind_proxies(replicated()).await;
    let delayed = || proxies.iter().map(|proxy| proxy.counts().delayed_chunks).sum::<u64>();
    disturbed("jitter of 50 ms on every link, both ways", &mut cluster, async |_| {
        for (seed, proxy) in (0..).zip(&proxies) {
            proxy.set(Weather::Slow { least: Duration::ZERO, most: Duration::from_millis(50), seed });
        }
        eventually("much is late", async || (delayed() >= 1000).then_some(())).await;
        proxies.iter().for_each(|proxy| proxy.set(Weather::Fair));
    })
    .await;
    assert_eq!(metric(&cluster, "muster_dispatch_links_lost_total"), 0.0, "late is not dead");
}

#[tokio::test(flavor = "multi_thread")]
async fn packet_loss_on_every_link_changes_no_token() {
    let network = match Network::new() {
        Ok(network) => network,
        Err(lacking) => {
            // Past what the test runner hides of tests that pass.
            let _ = writeln!(
                std::io::stderr(),
                "\nskipped: packet_loss_on_every_link_changes_no_token: {lacking}"
            );
            return;
        }
    };
    let mut cluster = Cluster::start(replicated().across(&network));
    disturbed("10 % packet loss on every link, both ways", &mut cluster, async |_| {
        network.lose(10);
        eventually("packets are lost", async || (network.lost() >= 300).then_some(())).await;
        network.heal();
    })
    .await;
}

/// Three honest replicas, and one liar per lie, each beginning with a different lie.
async fn lied_to(what: &str, lies: &'static [Lie]) {
    let mut liars = Vec::new();
    let mut cluster = Cluster::start_through(replicated().tcp(), async |mut workers| {
        for first in 0..lies.len() {
            let honest = &workers[first % 3];
            liars.push(Liar::start(&format!("liar-{first}"), honest, lies, first).await.expect("a liar"));
        }
        workers.extend(liars.iter().map(|liar| liar.address.clone()));
        workers
    })
    .await;
    let told = || -> Vec<u64> {
        let told: Vec<Vec<u64>> = liars.iter().map(Liar::told).collect();
        (0..lies.len()).map(|lie| told.iter().map(|told| told[lie]).sum()).collect()
    };
    disturbed(what, &mut cluster, async |cluster| {
        assert_eq!(metric(cluster, "muster_dispatch_workers_banned_total"), 0.0, "they were honest so far");
        liars.iter().for_each(Liar::begin);
        eventually("every lie is told", async || told().iter().all(|&told| told > 0).then_some(())).await;
    })
    .await;
    let all: u64 = told().iter().sum();
    let (banned, bad) = (
        metric(&cluster, "muster_dispatch_workers_banned_total"),
        metric(&cluster, "muster_dispatch_bad_replies_total"),
    );
    assert!(bad > 0.0 && banned > 0.0);
    // Lies after the discovery of a liar come only from shards already under way.
    assert!(
        all as f64 <= 4.0 * (banned + liars.len() as f64),
        "{all} lies, {bad} bad replies, {banned} bans"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn liars_among_honest_replicas_are_found_out_and_cut_off() {
    lied_to("six lying workers among three honest replicas", &Lie::OUTPUTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn liars_in_errors_among_honest_replicas_are_found_out_and_cut_off() {
    lied_to("eight workers that lie in errors among three honest replicas", &Lie::ERRORS).await;
}
