//! The service killed in the middle of a build: it is done again, and nothing of the first attempt
//! is left.

use serde_json::json;

use super::{ask, built, delete, log, snapshots, template};
use crate::service::Service;

#[tokio::test]
async fn a_build_survives_the_service() {
    let mut service = Service::start(0).await;
    let golden = snapshots(&service);
    let steps = json!([{ "run": "echo step" }, { "check": "true" }]);
    let points = ["begun", "stepped", "settled", "written", "tried", "published", "noted"];
    for point in points {
        service.terminate().await;
        service.start_again_as(&[], &[("RETHAW_FAILPOINT", &format!("build.{point}"))]).await;
        let name = format!("t-{point}");
        let body = json!({ "name": name, "steps": steps });
        service.client().post_unanswered("/v1/templates", &body).await;
        service.died().await;
        service.start_again().await;
        let made = built(&service, &name).await;
        assert_eq!(made["state"], "ready", "{point}: {made}");
        let ended = log(&service, &name).await;
        if point != "noted" {
            assert_eq!(ended.last().unwrap()["text"], "ready", "{point}");
        }
        assert_eq!(service.home().vm_ids(), Vec::<String>::new(), "{point}");
        delete(&service, &name).await.expect(204);
        assert_eq!(snapshots(&service), golden, "{point}");
    }

    // Killed in the middle of a deletion: what is not known any more is removed at the next start.
    super::build(&service, "gone", "base", &steps).await;
    service.terminate().await;
    service.start_again_as(&[], &[("RETHAW_FAILPOINT", "template.forgotten")]).await;
    service.client().post_unanswered("DELETE /v1/templates/gone", &json!({})).await;
    service.died().await;
    service.start_again().await;
    service.client().get("/v1/templates/gone").await.refused(404, "template_not_found");
    assert_eq!(snapshots(&service), golden);

    // Told to stop in the middle of a step: it stops at once and goes on afterwards.
    let slow = json!([{ "run": "test -e /once && exit 0; touch /once; sleep 600" }]);
    ask(&service, "slow", "base", &slow).await.expect(202);
    let running = async || (template(&service, "slow").await["step"] == 1).then_some(());
    service.until("the step runs", running).await;
    service.terminate().await;
    service.nothing_left();
    service.start_again().await;
    service
        .until("it runs again", async || {
            (template(&service, "slow").await["step"] == 1).then_some(())
        })
        .await;
    // Deleting it stops it.
    delete(&service, "slow").await.expect(204);
    assert_eq!(snapshots(&service), golden);
    service.stop().await;
}
