//! The dashboard in a real browser: what it shows while sandboxes come and go, with the keyboard
//! alone, in light and in dark.

use serde_json::json;

use crate::browser::{Browser, key};
use crate::service::Service;

/// Whether the table has a row for the sandbox.
fn row(id: &str) -> String {
    format!("document.querySelector('#sandboxes tr[data-key=\"{id}\"]')")
}

async fn ready_cells(browser: &Browser) -> u64 {
    browser.value("document.querySelectorAll('.cells .cell.ready').length").await.as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_shows_what_happens() {
    let service = Service::start(2).await;
    let browser = Browser::start(service.home().path()).await;
    browser.prefer("dark", false).await;
    let url = service.client().url().to_owned();
    browser.go(&url).await;

    // Nothing is shown, and nothing is asked, without the key.
    browser.until("!document.getElementById('gate').hidden").await;
    assert_eq!(browser.value("document.getElementById('board').hidden").await, true);
    assert_eq!(browser.value("document.activeElement.id").await, "key", "ready to be typed into");
    assert_eq!(browser.console().await, Vec::<String>::new());

    // The key is typed once.
    browser.type_text(&service.key()).await;
    browser.press(&[key::ENTER]).await;
    browser.until("document.getElementById('link').dataset.state === 'live'").await;
    browser.until("document.querySelectorAll('.cells .cell.ready').length === 2").await;
    let kept = "[sessionStorage.length, Object.values(localStorage).length, document.cookie]";
    assert_eq!(browser.value(kept).await, json!([1, 0, ""]));
    browser.until("document.querySelector('#templates .name')?.textContent === 'base'").await;
    assert_eq!(
        browser.value("document.querySelector('#templates .state').textContent").await,
        "ready"
    );

    // A sandbox comes: it is in the table at once, and the pool drains and fills again.
    let named = service.create_with(&json!({ "metadata": { "name": "<b>web</b>" } })).await;
    let id = crate::service::id(&named);
    browser.until(&row(&id)).await;
    let shown = format!("{}.querySelector('.name').textContent", row(&id));
    assert_eq!(browser.value(&shown).await, "<b>web</b>", "a name is text, not markup");
    assert_eq!(
        browser.value(&format!("{}.querySelector('.origin').textContent", row(&id))).await,
        "warm"
    );
    service.pool_full(2).await;
    browser.until("document.querySelectorAll('.cells .cell.ready').length === 2").await;
    // The claim is in the numbers and in the chart once its interval is over.
    browser.until("document.querySelector('#tile-claim strong').textContent.includes('ms')").await;
    browser.until("document.querySelector('#latency-chart .dot.c-claim')").await;
    browser.until("document.querySelectorAll('#faults-chart .line').length > 0").await;
    // So is one that found nothing parked, in lines of its own.
    service.set_pool(0).await;
    let cold = service.create().await;
    browser.until("document.querySelector('#latency-chart .dot.c-cold')").await;
    service.client().delete(&format!("/v1/sandboxes/{cold}")).await.expect(204);
    service.set_pool(2).await;

    // It is kept over a reload of the tab.
    browser.go(&url).await;
    browser.until(&row(&id)).await;

    // More than one, with some history, for the pictures.
    let second = service.create().await;
    service.act(&second, "pause", &json!({})).await.expect(200);
    browser
        .until(&format!("{}?.querySelector('.state').textContent === 'paused'", row(&second)))
        .await;
    service.act(&id, "fork", &json!({ "count": 1 })).await.expect(201);
    browser.until("document.querySelectorAll('#sandboxes tr').length === 3").await;
    service.pool_full(2).await;
    browser.until("document.querySelectorAll('.cells .cell.ready').length === 2").await;
    browser.picture("dashboard-dark").await;

    // A target is changed with the pool's own buttons.
    browser.run("document.querySelector('.stepper button:last-child').click()").await;
    service.pool_full(3).await;
    browser.until("document.querySelectorAll('.cells .cell.ready').length === 3").await;
    assert_eq!(ready_cells(&browser).await, 3);

    // It vanishes when it is deleted.
    assert_eq!(service.client().delete(&format!("/v1/sandboxes/{second}")).await.status, 204);
    browser.until(&format!("!{}", row(&second))).await;

    // Light, because the system says so; dark, because the user does.
    let ground = "getComputedStyle(document.body).backgroundColor";
    let dark = browser.value(ground).await;
    browser.prefer("light", true).await;
    let light = browser.value(ground).await;
    assert_ne!(dark, light);
    browser.picture("dashboard-light").await;
    browser
        .run("document.getElementById('theme').click(); document.getElementById('theme').click()")
        .await;
    assert_eq!(browser.value(ground).await, dark, "chosen by hand");
    let motion = "getComputedStyle(document.querySelector('.dot')).animationName";
    assert_eq!(browser.value(motion).await, "none", "less motion was asked for");

    assert_eq!(browser.console().await, Vec::<String>::new());
    let requests = browser.requests().await;
    assert!(requests.iter().any(|asked| asked.ends_with("/v1/events")), "{requests:?}");
    // The browser opens with a page of its own that is part of it.
    for asked in requests.iter().filter(|asked| !asked.starts_with("chrome://")) {
        assert!(asked.starts_with(&format!("{url}/")) || asked.starts_with("data:"), "{asked}");
    }
    browser.stop().await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keyboard_is_enough() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let browser = Browser::start(service.home().path()).await;
    let url = service.client().url().to_owned();
    browser.go(&url).await;

    // A wrong key is refused in words, and asked for again.
    browser.until("document.activeElement.id === 'key'").await;
    browser.type_text("not-the-key").await;
    browser.press(&[key::ENTER]).await;
    browser
        .until("document.getElementById('gate-error').textContent.includes('not this service')")
        .await;
    assert_eq!(browser.value("sessionStorage.length").await, 0);
    // The browser itself reports the refusal.
    let console = browser.console().await;
    assert!(console.len() == 1 && console[0].contains("401"), "{console:?}");
    browser.until("document.activeElement.id === 'key'").await;
    browser.type_text(&service.key()).await;
    browser.press(&[key::ENTER]).await;
    browser.until(&row(&id)).await;

    // The skip link is the first stop and leads past the bar.
    browser.run("document.activeElement.blur()").await;
    browser.tab_to("e.classList.contains('skip')").await;
    browser.press(&[key::ENTER]).await;
    browser.until("document.activeElement.id === 'main'").await;

    // Through the chart, in time.
    browser.tab_to("e.matches('#latency-chart .plot')").await;
    browser.until("document.querySelectorAll('#faults-chart .line').length > 0").await;
    browser.press(&[key::LEFT]).await;
    browser.until("!document.querySelector('#latency-chart .tip').hidden").await;
    browser.press(&[key::ESCAPE]).await;
    browser.until("document.querySelector('#latency-chart .tip').hidden").await;

    // Every control has a name and shows where the focus is.
    let nameless = "[...document.querySelectorAll('button, input, [tabindex=\"0\"]')].filter((e) => \
        !(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.getAttribute('aria-labelledby')))\
        .map((e) => e.outerHTML)";
    assert_eq!(browser.value(nameless).await, json!([]));

    // Into a sandbox, and out again to where one was.
    browser.tab_to(&format!("e.closest('tr')?.dataset.key === '{id}'")).await;
    let outline = browser.value("getComputedStyle(document.activeElement).outlineStyle").await;
    assert_eq!(outline, "solid");
    browser.press(&[key::ENTER]).await;
    browser.until("document.querySelectorAll('#detail .items .ok').length > 5").await;
    assert_eq!(browser.value("document.getElementById('detail').open").await, true);
    browser.picture("dashboard-sandbox").await;
    browser.press(&[key::ESCAPE]).await;
    browser.until("!document.getElementById('detail').open").await;
    browser.until(&format!("document.activeElement.closest('tr')?.dataset.key === '{id}'")).await;

    // Deleting takes two presses.
    browser.press(&[key::ENTER]).await;
    browser.until("document.querySelector('#detail .danger')").await;
    browser.tab_to("e.classList.contains('danger')").await;
    browser.press(&[key::ENTER]).await;
    browser
        .until("document.querySelector('#detail .danger').textContent === 'Really delete?'")
        .await;
    assert_eq!(service.sandbox(&id).await.status, 200);
    browser.press(&[key::ENTER]).await;
    service.sandbox_gone(&id).await;
    browser.until("!document.getElementById('detail').open").await;
    browser.until("!document.getElementById('sandboxes-empty').hidden").await;

    // The key is forgotten when told to.
    browser.run("document.getElementById('forget').click()").await;
    browser.until("!document.getElementById('gate').hidden").await;
    assert_eq!(browser.value("sessionStorage.length").await, 0);
    assert_eq!(browser.console().await, Vec::<String>::new());
    browser.stop().await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_itself_is_guarded() {
    let service = Service::start_with(0, &[]).await;
    let anyone = service.client().with_key(None);
    let page = anyone.get("/").await;
    assert_eq!(page.status, 200);
    let header = |name: &str| page.headers[name].to_str().unwrap().to_owned();
    assert!(header("content-type").starts_with("text/html"));
    let policy = header("content-security-policy");
    for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert_eq!(header("x-content-type-options"), "nosniff");
    assert!(page.text().contains("data-key=\"needed\""));
    assert!(!page.text().contains(&service.key()));

    let script = anyone.get("/dashboard/app.js").await;
    assert_eq!(script.status, 200);
    let tag = script.headers["etag"].to_str().unwrap().to_owned();
    let again = anyone.send("GET", "/dashboard/app.js", &[("if-none-match", &tag)], "").await;
    assert_eq!((again.status, again.body.len()), (304, 0));
    anyone.get("/dashboard/nothing.js").await.refused(404, "route_not_found");
    anyone.get("/v1/stats").await.refused(401, "unauthorized");
    anyone.get("/v1/events").await.refused(401, "unauthorized");
    service.stop().await;
}
